"""The rooms of the training: what holo1_dom_finetune.py needs and is not known for.

A page meets them in this order: settings, dataset, packing, memory_plan, fast_layers, publishing.
"""
