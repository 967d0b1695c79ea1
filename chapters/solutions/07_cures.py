"""Solutions of chapter 07."""

import torch

# Each of the three lets the weights that reach the output add up to less than 1, so
# that a head can be silent anywhere. Under headnorm the output keeps its length, and a
# head must still look somewhere: several seeds rest on token 0.
prediction = ["sigmoid", "gated", "logit"]

# Token 1 now sees only itself, as token 0 does, which the others no longer see. At
# resting queries the loss stays as it was: place 1 is as good to rest on as place 0.
mask = torch.ones(16, 16, dtype=torch.bool)
mask[1:, 0] = False
