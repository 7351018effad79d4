"""Names of the images that components run in; compiling replaces them by what a registry holds.

The local runner warns of an image whose name has no `python` in it.
"""

DATA = "opensora-python-data"
CAPTION = "opensora-python-caption"
TRAIN = "opensora-python-train"
EVALUATE = "opensora-python-evaluate"
IMAGES = (DATA, CAPTION, TRAIN, EVALUATE)
