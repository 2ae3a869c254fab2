"""The picture dictionary: `load_picture_dictionary`."""

from clipid_utils.files import need


def __getattr__(name: str):
    if name == "load_picture_dictionary":  # imported when needed: `datasets` takes a second
        need("datasets", "data")
        from clipid_utils.data.dictionary.build import load_picture_dictionary

        return load_picture_dictionary
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
