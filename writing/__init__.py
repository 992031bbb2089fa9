"""What makes writing fast and makes documents end, over use_model_from_hub.

Rooms from top to bottom; each may import those below it, and none above:

    server      pages written by a server elsewhere that speaks OpenAI's protocol, whatever goes wrong there
"""
