"""The built-in default data set: rendered "products" in the layout of Stanford Online Products.

A product is a silhouette from one of a few families with its own proportions, colours, texture and lettering. Its
photographs vary in distance, viewpoint, light, background, clutter, occlusion, sharpness and JPEG quality. Neither the
outline, which a family shares, nor colour, since light varies, identifies a product on its own.
"""

import colorsys
import io
import math
import string
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from nsl_dist import cluster, storage
from nsl_dist.data.layouts import SOP_HEADER, SOP_SPLITS

EDGE = 96  # width and height of a photograph, pixels
CANVAS = 144  # width and height of the canvas that a product is drawn on, pixels

FAMILIES = ("bottle", "mug", "lamp", "bag", "chair", "clock", "shoe", "toaster", "vase", "kettle")
TEXTURES = ("plain", "stripes", "checks", "dots", "rings", "zigzag")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Spec:
    """Number of products and photographs to render; the values name the cache folder."""

    train_classes: int = 160
    test_classes: int = 60
    fewest_images: int = 8
    most_images: int = 16
    seed: int = 0
    version: int = 2  # renderer version


@dataclass(frozen=True)
class Product:
    """The properties shared by all photographs of a product."""

    family: str
    proportions: tuple[float, float, float]
    body: Colour
    accent: Colour
    texture: str
    texture_angle: float
    texture_pitch: int
    lettering: str
    lettering_height: float


def write_products(cache: str, spec: Spec | None = None) -> str:
    """Render a data set into a folder in `cache` unless it exists; return its root.

    For one product in twenty, half of the photographs are grayscale, like some in Stanford Online Products.
    """
    spec = spec or Spec()
    name = f"products-{spec.train_classes}-{spec.test_classes}-{spec.fewest_images}-{spec.most_images}"
    root = storage.join(storage.absolute(cache), f"{name}-seed{spec.seed}-v{spec.version}")
    if storage.exists(storage.join(root, SOP_SPLITS["test"])):  # written last
        return root
    started = time.monotonic()
    print(f"Rendering {spec.train_classes + spec.test_classes} synthetic products into {root}", flush=True)
    num_images = 0
    first_class = 1
    for split, num_classes in (("train", spec.train_classes), ("test", spec.test_classes)):
        class_ids = range(first_class, first_class + num_classes)
        rendered = ray.data.from_items([*class_ids], override_num_blocks=num_classes).map(
            lambda row: _render_class(spec, row["item"], root), **cluster.prefer_cpu_nodes()
        )
        lines = [SOP_HEADER]
        for row in sorted(rendered.iter_rows(), key=lambda row: row["class_id"]):
            for path in row["paths"]:
                num_images += 1
                lines.append(f"{num_images} {row['class_id']} {row['family']} {path}")
        storage.write_bytes(storage.join(root, SOP_SPLITS[split]), ("\n".join(lines) + "\n").encode())
        first_class += num_classes
    print(f"Rendered {num_images:,} photographs in {time.monotonic() - started:.0f} s", flush=True)
    return root


def _render_class(spec: Spec, class_id: int, root: str) -> dict[str, Any]:
    """Write the photographs of one product; return its class, family number and their paths."""
    rng = np.random.default_rng((spec.seed, class_id))
    product = draw_product(rng)
    gray_share = 0.5 if rng.random() < 0.05 else 0.0
    paths = []
    for view in range(int(rng.integers(spec.fewest_images, spec.most_images + 1))):
        paths.append(f"{product.family}_final/{class_id:06d}_{view:03d}.JPG")
        photo = photograph(product, rng, gray=bool(rng.random() < gray_share))
        storage.write_bytes(storage.join(root, paths[-1]), photo)
    return {"class_id": class_id, "family": FAMILIES.index(product.family) + 1, "paths": paths}


def draw_product(rng: np.random.Generator) -> Product:
    """Draw a product's identity."""
    family = int(rng.integers(len(FAMILIES)))
    hue = rng.random()
    body = _colour(hue, rng.uniform(0.3, 0.9), rng.uniform(0.4, 1.0))
    accent = _colour((hue + rng.uniform(0.15, 0.85)) % 1.0, rng.uniform(0.1, 0.9), rng.uniform(0.2, 1.0))
    return Product(
        family=FAMILIES[family],
        proportions=(float(rng.random()), float(rng.random()), float(rng.random())),
        body=body,
        accent=accent,
        texture=str(rng.choice(TEXTURES)),
        texture_angle=float(rng.uniform(0, 180)),
        texture_pitch=int(rng.integers(9, 24)),
        lettering="".join(rng.choice(list(string.ascii_uppercase), size=int(rng.integers(1, 4)))),
        lettering_height=float(rng.uniform(0.35, 0.75)),
    )


def photograph(product: Product, rng: np.random.Generator, *, gray: bool = False) -> bytes:
    """Render a photograph of a product as JPEG, `EDGE` x `EDGE` pixels."""
    item = _viewed(_drawn(product), rng)
    scene = _background(rng)
    scene.paste(item, (0, 0), item)
    if rng.random() < 0.35:  # occlusion
        _blob(ImageDraw.Draw(scene), rng, largest=0.25)
    photo = _lit(scene, rng)
    if rng.random() < 0.3:
        photo = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    if gray:
        photo = photo.convert("L")
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=int(rng.integers(45, 92)))
    return encoded.getvalue()


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _drawn(product: Product) -> Image.Image:
    """Draw the front view of a product on a transparent canvas."""
    size = CANVAS
    mask = Image.new("L", (size, size))
    _silhouette(ImageDraw.Draw(mask), product)
    surface = _textured(product)
    draw = ImageDraw.Draw(surface)
    font = ImageFont.load_default(size * 0.25)
    middle = (size / 2, size * product.lettering_height)
    left, top, right, bottom = draw.textbbox(middle, product.lettering, font=font, anchor="mm")
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill=product.accent)
    dark = sum(product.accent) < 380
    draw.text(middle, product.lettering, font=font, anchor="mm", fill=(245, 245, 240) if dark else (25, 25, 30))
    surface.putalpha(mask)
    return surface


def _silhouette(draw: ImageDraw.ImageDraw, product: Product) -> None:
    """Fill the outline of the product's family, stretched by its proportions, in units of the canvas."""
    a, b, c = product.proportions

    def box(x0: float, y0: float, x1: float, y1: float, *, radius: float = 0.0) -> None:
        corners = tuple(CANVAS * value for value in (x0, y0, x1, y1))
        draw.rounded_rectangle(corners, radius=CANVAS * radius, fill=255)

    def ellipse(x: float, y: float, rx: float, ry: float) -> None:
        draw.ellipse(tuple(CANVAS * value for value in (x - rx, y - ry, x + rx, y + ry)), fill=255)

    def ring(x: float, y: float, r: float, width: float) -> None:
        corners = tuple(CANVAS * value for value in (x - r, y - r, x + r, y + r))
        draw.ellipse(corners, outline=255, width=round(CANVAS * width))

    def polygon(*points: tuple[float, float]) -> None:
        draw.polygon([(CANVAS * x, CANVAS * y) for x, y in points], fill=255)

    match product.family:
        case "bottle":
            half = 0.13 + 0.13 * a
            box(0.5 - half, 0.35 + 0.1 * b, 0.5 + half, 0.95, radius=0.02 + 0.08 * c)
            box(0.5 - 0.07, 0.06, 0.5 + 0.07, 0.5)
        case "mug":
            half = 0.2 + 0.1 * a
            box(0.45 - half, 0.25 + 0.15 * b, 0.45 + half, 0.85, radius=0.03 + 0.1 * c)
            ring(0.45 + half, 0.57, 0.14 + 0.04 * c, 0.05)
        case "lamp":
            top, bottom = 0.08 + 0.14 * a, 0.24 + 0.16 * b
            polygon((0.5 - top, 0.1), (0.5 + top, 0.1), (0.5 + bottom, 0.62), (0.5 - bottom, 0.62))
            box(0.47, 0.6, 0.53, 0.9)
            ellipse(0.5, 0.9, 0.12 + 0.14 * c, 0.05)
        case "bag":
            half = 0.24 + 0.14 * a
            polygon((0.5 - half + 0.1 * b, 0.36), (0.5 + half - 0.1 * b, 0.36), (0.5 + half, 0.92), (0.5 - half, 0.92))
            ring(0.5, 0.36, 0.14 + 0.08 * c, 0.045)
        case "chair":
            half = 0.18 + 0.1 * a
            box(0.5 - half, 0.08, 0.5 + half, 0.42 + 0.15 * b, radius=0.12 * c)
            box(0.5 - half - 0.04, 0.52, 0.5 + half + 0.04, 0.64)
            for x in (0.5 - half, 0.5 + half - 0.06):
                box(x, 0.6, x + 0.06, 0.95)
        case "clock":
            ellipse(0.5, 0.5, 0.27 + 0.12 * a, 0.27 + 0.12 * b)
            for x in (0.3, 0.7):
                ellipse(x, 0.16 + 0.05 * c, 0.06 + 0.06 * c, 0.08)
        case "shoe":
            polygon((0.12, 0.4 - 0.15 * a), (0.42, 0.36), (0.62, 0.55 - 0.1 * b), (0.9, 0.66), (0.93, 0.8), (0.12, 0.8))
            box(0.1, 0.76, 0.94, 0.82 + 0.07 * c, radius=0.03)
        case "toaster":
            box(0.12 + 0.06 * a, 0.3 + 0.12 * b, 0.84, 0.85, radius=0.04 + 0.14 * c)
            box(0.84, 0.42, 0.92, 0.56)
        case "vase":
            points = []
            for step in range(25):
                t = step / 24
                wide = 0.1 + 0.08 * a + (0.1 + 0.14 * b) * math.sin(math.pi * (0.15 + 0.85 * t) ** (0.7 + 1.3 * c))
                points.append((wide, 0.06 + 0.88 * t))
            polygon(*[(0.5 - w, y) for w, y in points], *[(0.5 + w, y) for w, y in reversed(points)])
        case _:  # kettle
            ellipse(0.48, 0.62, 0.24 + 0.08 * a, 0.26 + 0.04 * b)
            polygon((0.66, 0.55), (0.94, 0.34 + 0.1 * c), (0.94, 0.44 + 0.1 * c), (0.7, 0.74))
            ring(0.48, 0.36, 0.17 + 0.05 * b, 0.045)


def _textured(product: Product) -> Image.Image:
    """Fill the canvas with the product's texture in its two colours."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    angle, pitch = math.radians(product.texture_angle), product.texture_pitch
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    match product.texture:
        case "stripes":
            on = (u // pitch) % 2 == 0
        case "checks":
            on = (u // pitch + v // pitch) % 2 == 0
        case "dots":
            on = (u % (1.5 * pitch) - 0.75 * pitch) ** 2 + (v % (1.5 * pitch) - 0.75 * pitch) ** 2 < (0.45 * pitch) ** 2
        case "rings":
            on = (np.hypot(x - CANVAS / 2, y - CANVAS / 2) // (0.7 * pitch)) % 2 == 0
        case "zigzag":
            on = ((v + np.abs(u % (2 * pitch) - pitch)) // (0.8 * pitch)) % 2 == 0
        case _:
            on = np.zeros_like(u, dtype=bool)
    pixels = np.where(on[..., None], np.array(product.accent), np.array(product.body)).astype(np.uint8)
    return Image.fromarray(pixels)


def _viewed(item: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Project the canvas onto the photograph from a random viewpoint."""
    # Were all near and upright, a pretrained network would know the products apart without training.
    half = EDGE * rng.uniform(0.2, 0.54)
    angle = math.radians(rng.normal(0, 75))
    squeeze = rng.uniform(0.8, 1.0)  # seen from the side
    centre = EDGE / 2 + rng.uniform(-0.07, 0.07, 2) * EDGE
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [half * squeeze, half]
    corners = corners * (1 + rng.uniform(-0.1, 0.1, (4, 1)))  # perspective
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    target = corners @ rotation.T + centre
    source = np.array([[0, 0], [CANVAS, 0], [CANVAS, CANVAS], [0, CANVAS]], dtype=float)
    return item.transform(
        (EDGE, EDGE), Image.Transform.PERSPECTIVE, _homography(target, source), Image.Resampling.BILINEAR
    )


def _homography(target: NDArray[np.float64], source: NDArray[np.float64]) -> list[float]:
    """Solve for the 8 coefficients that map target pixels to source pixels."""
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(value) for value in np.linalg.solve(np.array(rows), np.array(values))]


def _background(rng: np.random.Generator) -> Image.Image:
    """Render a cluttered background with a colour gradient."""
    colours = [_colour(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.2, 1.0)) for _ in range(2)]
    ramp = _ramp(rng)
    scene = Image.composite(
        Image.new("RGB", (EDGE, EDGE), colours[0]), Image.new("RGB", (EDGE, EDGE), colours[1]), ramp
    )
    draw = ImageDraw.Draw(scene)
    for _ in range(int(rng.integers(0, 4))):
        _blob(draw, rng, largest=0.45)
    noise = rng.normal(0, rng.uniform(1, 8), (EDGE, EDGE, 3))
    return Image.fromarray(np.clip(np.asarray(scene) + noise, 0, 255).astype(np.uint8))


def _ramp(rng: np.random.Generator) -> Image.Image:
    """Render a linear brightness ramp in a random direction."""
    turned = Image.linear_gradient("L").rotate(float(rng.uniform(0, 360)))
    return turned.resize((EDGE, EDGE), box=(38, 38, 218, 218))  # inside the rotated square, to avoid empty corners


def _blob(draw: ImageDraw.ImageDraw, rng: np.random.Generator, *, largest: float) -> None:
    """Draw a random rectangle or ellipse of up to `largest` of the edge."""
    width, height = rng.uniform(0.08, largest, 2) * EDGE
    x, y = rng.uniform(-0.1, 1.0, 2) * EDGE
    shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
    shape((x, y, x + width, y + height), fill=_colour(rng.random(), rng.uniform(0, 0.9), rng.uniform(0.15, 1.0)))


def _lit(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change exposure, light colour and contrast, and add a shadow on one side."""
    cast = np.clip(rng.normal(1.0, 0.05, 3) * rng.uniform(0.7, 1.15), 0, 1.5)
    bands = [
        band.point([min(255, round(value * gain)) for value in range(256)])
        for band, gain in zip(scene.split(), cast, strict=True)
    ]
    scene = Image.merge("RGB", bands)
    depth = rng.uniform(0, 0.4)
    shadow = _ramp(rng).point([round(255 - depth * value) for value in range(256)])
    scene = ImageChops.multiply(scene, Image.merge("RGB", [shadow] * 3))
    return ImageEnhance.Contrast(scene).enhance(rng.uniform(0.7, 1.3))
