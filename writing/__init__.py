"""What makes writing fast and makes documents end, over `use_model_from_hub`.

Rooms from top to bottom; each may import those below it, and none above:

    choosing        several answers to each screenshot, of which the best one is kept
    best_of         which of several answers looks most like the screenshot
    server          pages written by a server elsewhere that speaks OpenAI's protocol, whatever goes wrong there
    writer          the engine where it can write, else generate()
    engine          screenshots in, HTML out: slots, blocks of steps, memory
    step            the next token of every slot, captured as one CUDA graph
    drafts          tokens that may come, from what stands there already
    reading         screenshots and questions, read into slots
    slots           the static cache, and what a step knows of each slot
    endings         where an answer ends that would not: at its limit of tokens, in a loop, with elements left open
    loops           the same piece over and over, in token ids
    open_elements   what is open where a document breaks off, and the text that closes it
    token_bytes     the bytes of each token, and the fewest tokens for a text
"""
