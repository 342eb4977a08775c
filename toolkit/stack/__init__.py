"""K adapters on one frozen base, in one forward and backward pass; `toolkit.stack.stack` is the door."""
