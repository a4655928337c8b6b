"""The operations as torch.library custom ops: checks, dispatch and autograd."""
