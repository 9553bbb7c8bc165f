"""Settings: strict dataclasses, and plug-ins that are chosen by `use: name`."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from edgekd.core import plugins


class Settings:
    """Root of every dataclass that a configuration can fill. Unknown keys are mistakes."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}


class Plugin(Settings):
    """Root of the plug-in interfaces. One that names its FOLDER is read as {"use": NAME, its settings...}."""

    FOLDER: ClassVar[str]

    def fingerprint(self) -> str:
        """Return a hash of what is outside of edgekd and determines what the plug-in does: images, a user's code."""
        return ""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        if "FOLDER" not in vars(cls):
            return handler(source)
        from pydantic import TypeAdapter
        from pydantic_core import PydanticCustomError, core_schema

        folder = cls.FOLDER

        def read(value: Any, info: Any) -> Any:
            if isinstance(value, cls):
                return value
            if not isinstance(value, dict) or not isinstance(value.get("use"), str):
                raise PydanticCustomError(
                    "no_use",
                    "names no plug-in; write `use:` and one of {known}",
                    {"known": ", ".join(plugins.names(folder))},
                )
            kind = plugins.load(folder, value["use"])
            rest = {k: v for k, v in value.items() if k != "use"}
            return TypeAdapter(kind).validate_json(json.dumps(rest), strict=True, context=info.context)

        return core_schema.with_info_plain_validator_function(read)
