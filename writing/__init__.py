"""What makes writing fast and makes documents end, over `use_model_from_hub`.

Rooms from top to bottom; each may import those below it, and none above:

    endings         where an answer ends that would not: at its limit of tokens, in a loop, with elements left open
    loops           the same piece over and over, in token ids
    open_elements   what is open where a document breaks off, and the text that closes it
    token_bytes     the bytes of each token, and the fewest tokens for a text
"""
