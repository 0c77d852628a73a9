"""Who runs now: requests, the scheduler, the block manager, and the loop that joins them to a
runner. No torch.
"""
