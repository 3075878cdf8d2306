"""An encoder learned from the user's own reals alone: the self-supervised space without foreign weights."""
