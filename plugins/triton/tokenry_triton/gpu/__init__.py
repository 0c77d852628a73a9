"""What the plugins of torch's GPU type share: memory, captured programs, kernels in plain torch.

In: facts that a plugin's probe found. Out: a `Backend`. Knows no driver library; importing this
package alone imports no torch.
"""
