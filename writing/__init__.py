"""What makes writing fast: pages come out of slots that are filled again as soon as one ends.

Rooms from top to bottom; each may import those below it, and none above:

    engine          screenshots in, HTML out: slots, blocks of steps, memory
    step            the next token of every slot, captured as one CUDA graph
    drafts          tokens that may come, from what stands there already
    reading         screenshots and questions, read into slots
    slots           the static cache, and what a step knows of each slot
"""
