"""torch.hub's entry point: the shipped generator; a clone needs no network.

    import torch
    from PIL import Image
    from torchvision.transforms.functional import to_pil_image, to_tensor
    generator = torch.hub.load(".", "face_sr_8x", source="local")
    face = to_tensor(Image.open("face.png").convert("RGB"))[None]
    to_pil_image(generator(face)[0].detach()).save("out.png")
"""

dependencies = ["torch", "tqdm"]


def face_sr_8x():
    """The shipped generator in eval mode: LR (N, 3, h, w) in [0, 1] -> SR (N, 3, 8h, 8w).

    For a face in whatever framing whose frame has 16 to 48 px, reduced bicubically.
    """
    from support.checkpoints import load_generator, shipped_generator
    return load_generator(shipped_generator())
