"""UE8M0-FP8: weights as E4M3 codes with one power of two for each 128x128 block.

A power-of-two scale only moves exponents, so the value a code stands for is exact in BF16, and the
same bytes can be handed from one chip family to another without rounding. `spec` states the format
and its one rule without any library; `reference` applies it to tensors in plain torch, `kernels` in C
with the same bits, and `codec` is what everyone calls: it takes whichever of the two fits.
"""
