"""Public checkpoints of the Wan family, told apart by the names of their tensors, read one tensor at a time.

tensors.py     safetensors files, one or many, as tensors that are read when they are asked for; and writing them
pickles.py     .pt and .pth files, without running what they hold
names.py       original Wan names <-> diffusers' names; wrappers and residues that training leaves
text_names.py, vae_names.py   names of the text encoder and of the VAE
detect.py      what a set of names is: transformer, text encoder, VAE, small decoder, LoRA
sizes.py       a transformer's config from the shapes of its tensors
lora.py        LoRA in peft's and kohya's names, merged where a weight is read
codecs.py      the codec of a checkpoint
presets.py     how each published model was made to be streamed
locate.py      which files of a folder are which part of a model
loading.py     from files to modules
convert.py     from files to files
places.py      where what is fetched or computed is kept
"""
