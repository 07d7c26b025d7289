"""Any picture mode to 8-bit RGB in sRGB: upright, on white, 16 bits scaled rather than clipped."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

# EXIF orientation -> what makes the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, None when it is so already. Broken EXIF data count as none."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError):
        return None


def to_rgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The picture as 8-bit RGB in sRGB, see-through parts on white, and its alpha (mode L; None when all is solid)."""
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB"), None
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return _to_srgb(image, "RGB"), None
    clear = _to_srgb(image.convert("RGBA"), "RGBA")
    white = Image.new("RGBA", clear.size, "white")
    alpha = clear.getchannel("A")
    return Image.alpha_composite(white, clear).convert("RGB"), None if alpha.getextrema() == (255, 255) else alpha


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits, or of floats, scaled to 8 bits. Pillow's own convert clips it to white."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)  # (height, width)
    low, high = min(float(grey.min()), 0.0), float(grey.max())
    if image.mode == "F":
        top = 1.0 if high <= 1 else 255.0 if high <= 255 else high
    elif image.mode.startswith("I;16"):
        top = 65535.0
    else:
        top = 255.0 if high <= 255 else 65535.0 if high <= 65535 else high
    scaled = (grey - low) / (top - low) * 255
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, mode: str) -> Image.Image:
    """The picture in sRGB through its embedded colour profile; a missing or unusable profile is passed over."""
    profile = image.info.get("icc_profile")
    if image.mode in ("P", "PA", "1", "RGBX", "YCbCr", "HSV", "LA", "RGBa"):
        image = image.convert(mode)
    if not profile or image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image.convert(mode)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode in ("RGB", "RGBA") and "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert(mode)
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # damaged, or of another colour space
        return image.convert(mode)
    return image.convert(mode) if converted is None else converted
