"""Load the final folder of the current folder with nothing but transformers; every key must be found and used."""

from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "./holo1_dom_finetune_final"
options = {"trust_remote_code": True, "output_loading_info": True}
model, info = AutoModelForImageTextToText.from_pretrained(folder, **options)
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
problems = {name: found for name, found in info.items() if found}
assert not problems, problems
