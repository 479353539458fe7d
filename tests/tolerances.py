"""Every tolerance of the tests, with its reason."""

# FP32 layouts differ only in the order of additions: measured 1e-7 to 1e-6 over 20 steps.
FP32_LAYOUTS = 1e-5

# In FP8 a difference in the last bit of a BF16 activation can move its code by one step of E4M3 (2^-4 of it), and BF16
# parameters and activations round at 2^-9. Over 20 steps of a model whose loss falls from 5.5 to about 4 that stays
# below this.
FP8_LAYOUTS = 5e-3

# Megatron's and Hugging Face's FP32 forward of one set of weights: the same operations in another order of addition.
LOGITS = 1e-4

# A GEMM accumulated in FP32 and rounded once to BF16 (2^-9 of an element, relative to the largest), against FP64.
BF16_OUTPUT = 2**-8

# The same tokens in other packs and micro-batches, FP32: sums of losses in another order.
FP32_PACKING = 1e-6

# Linear cross entropy in FP32 against FP64: sums of at most a few hundred products, relative to the largest element
# or, where that is small, to what one token gives.
FP32_LINEAR_CROSS_ENTROPY = 1e-5

# Log-probabilities in FP32 from given logits against FP64: sums of exponentials, then a difference of numbers below 50.
FP32_LOGPROBS = 1e-5

# Mean error of a BF16 model's log-probabilities: its logits, which reach 8, are rounded at 2^-9 of themselves, and so
# is each activation on the way.
BF16_LOGPROBS = 0.02
