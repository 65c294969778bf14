"""What the killed processes of test_train.py start from: the imports, a tiny face network.

A fork server imports this once; drawing the curves takes longer than a tiny run.
"""

import figures
import train_identity
from tests.conftest import TinyFaces

figures.save_curves = lambda table, path: None
train_identity.load_face_network = lambda weights: TinyFaces()
