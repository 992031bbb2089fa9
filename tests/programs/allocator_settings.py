"""What torch's allocator goes by, of what the environment says to it."""

import torch

print(torch._C._accelerator_getAllocatorSettings())
