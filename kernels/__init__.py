"""What a GPU does faster than torch's own functions do it, for training and writing alike.

Rooms from top to bottom; each may import those below it, and none above:

    attention        attention inside packed pages, by the kernel that proves right
    window_attention attention inside windows of 64 patches, each by a program of its own
    gated_delta      linear attention inside packed pages, by the way that proves right
    fp8              products in fp8, with the casts and transposes that they need
    slot_attention   attention of new tokens over the slots of a static cache
    delta_step       one step of the gated delta rule for each slot
    skinny_products  products of a few rows with large weights
    broad_products   the same of more rows, as Hopper's tensor cores take them
    adamw_8bit_kernel  AdamW's step with moments in 8 bits, one pass over memory
    adamw_kernel     AdamW's step on split masters, one pass over memory
    norm_kernels     norms of many rows and their gradients, one pass over memory each
    swiglu_kernels   silu(gate) * up and its gradients, one pass over memory each
    rotary_kernel    rotary positions at the speed of a GPU's memory
    row_kernels      norms, activations and the likeliest token, one pass over memory each
    product_parts    what kernels have in common whose programs share a piece of work
    masters          fp32 masters as bf16 weights and 16-bit rests, and AdamW's step on them by torch
    trials           what kernels' libraries find out on a machine, kept and tried aside
    loading          kernels loaded by several threads at once
    launching        launches of Triton kernels that were launched before, by less Python
    early            kernels that begin while the one before them ends
    positions        where tokens and patches stand
"""
