"""hubconf.py: what torch.hub loads is the shipped generator."""

import ast
import re
import sys

import torch
from conftest import ROOT
from PIL import Image

import hubconf
from support.checkpoints import load_generator, shipped_generator


def test_hub_loads_the_shipped_generator():
    generator = torch.hub.load(str(ROOT), "face_sr_8x", source="local")
    expected = load_generator(shipped_generator())
    assert not generator.training and generator.scale_factor == 8
    for a, b in zip(generator.state_dict().values(), expected.state_dict().values()):
        assert torch.equal(a, b)


def test_the_lines_in_its_docstring_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), (200, 150, 120)).save("face.png")
    lines = re.findall(r"^    (.*)$", hubconf.__doc__, re.M)
    exec("\n".join(lines).replace('"."', repr(str(ROOT))), {})
    assert Image.open("out.png").size == (128, 128)


def test_hub_is_told_what_it_needs():
    """What the modules behind hubconf.py import at their head, numpy aside: PyTorch brings it."""
    found, todo = set(), {"support.checkpoints"}
    seen = set()
    while todo:
        name = todo.pop()
        seen.add(name)
        path = ROOT / f"{name.replace('.', '/')}.py"
        for node in ast.parse(path.read_text()).body:
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                     if isinstance(node, ast.ImportFrom) else [])
            todo |= {n for n in names if (ROOT / f"{n.replace('.', '/')}.py").exists()} - seen
            found |= {n.partition(".")[0] for n in names}
    others = found - {"support", "model", "numpy"} - sys.stdlib_module_names
    assert others == set(hubconf.dependencies)
