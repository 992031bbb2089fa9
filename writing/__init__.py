"""What writes pages, and chooses among them, over use_model_from_hub.py.

Rooms from top to bottom; each may import those below it, and none above:

    choosing        several answers to each screenshot, of which the best one is kept
    best_of         which of several answers looks most like the screenshot
"""
