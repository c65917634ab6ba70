"""Vision-language models that transformers does not have: DeepSeek-VL2 and MolmoE, made of transformers' own blocks.

``published`` reads the configurations as their authors publish them, ``configuration`` and the two modeling files are
transformers classes, ``conversion`` maps the published tensors' names, ``register`` tells transformers about all of it
(autoload.py does so when a configuration of theirs is met).
"""
