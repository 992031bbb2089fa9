"""What a GPU does faster than torch's own functions do it, for training and writing alike.

Rooms from top to bottom; each may import those below it, and none above:

    attention       attention inside packed pages, by the kernel that proves right
    rotary_kernel   rotary positions at the speed of a GPU's memory
    positions       where tokens and patches stand
"""
