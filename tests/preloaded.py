"""What the killed processes of test_train.py start from: the imports and one face network.

A fork server imports this once; building the network anew takes longer than a tiny run, and so
does drawing its curves.
"""

import functools

import figures
import train_identity

figures.save_curves = lambda table, path: None
train_identity.load_face_network = functools.cache(train_identity.load_face_network)
train_identity.load_face_network("random")
