"""From gradients to weights: optimizers, the learning rate, the loss scale, averaged weights."""
