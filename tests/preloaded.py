"""What the killed processes of test_train.py start from: the imports, a tiny face network.

A fork server imports this once; drawing the curves takes longer than a tiny run.
"""

import train_identity
import training_step
from support import figures
from tests.conftest import TinyFaces

figures.save_curves = lambda table, path: None
training_step.load_face_network = lambda weights: TinyFaces()
train_identity.LAZY_INTERVAL = 2
