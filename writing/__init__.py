"""What writes pages, and chooses among them, over use_model_from_hub.py.

Rooms from top to bottom; each may import those below it, and none above:

    best_of         which of several answers looks most like the screenshot
"""
