"""HTTP: OpenAI's wire format over an `AsyncEngine`, health, metrics and a page.

In: requests over HTTP. Out: JSON, server-sent events, errors in OpenAI's shape. Knows nothing of
schedulers and devices, and never imports torch.
"""
