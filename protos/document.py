"""Writes docs/api.md, the reference of the API, from the comments of the .proto files; `make generate` runs it.

`--check` only says whether what is checked in is what would be written.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

PROTOS = Path(__file__).parent
PAGE = PROTOS.parent / "docs" / "api.md"
PACKAGE = ".denoised.v1."
HEAD = """# API reference

Written by `protos/document.py` from the comments of `protos/denoised/v1`: edit those. How the pieces are used together,
and what to keep in mind, is in [the contract](../protos/README.md).
"""
# Numbers of descriptor.proto's own fields, which a comment's path is made of.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, NESTED, NESTED_ENUM, ONEOF = 2, 3, 4, 8
MEMBER = 2


class Comments:
    """The comment before each element of one file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._texts = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}

    def text(self, *path: int) -> str:
        lines = [line.removeprefix(" ").rstrip() for line in self._texts.get(path, "").splitlines()]
        return "\n".join(lines).strip()

    def row(self, *path: int) -> str:
        """On one line, for a table."""
        paragraphs = self.text(*path).split("\n\n")
        return "<br>".join(paragraph.replace("\n", " ") for paragraph in paragraphs).replace("|", "\\|")


def read() -> list[FileDescriptorProto]:
    buf = str(Path(sys.executable).parent / "buf")
    with tempfile.NamedTemporaryFile(suffix=".binpb") as image:
        subprocess.run([buf, "build", "--exclude-imports", "-o", image.name], cwd=PROTOS, check=True)
        files = FileDescriptorSet.FromString(Path(image.name).read_bytes()).file
    # What callers begin with comes first.
    order = ("pipeline", "generation", "worker", "artifact", "error_reason")
    stems = {file.name: file.name.rpartition("/")[2].removesuffix(".proto").removesuffix("_service") for file in files}
    return sorted(files, key=lambda file: order.index(stems[file.name]) if stems[file.name] in order else len(order))


def document(files: list[FileDescriptorProto]) -> Iterator[str]:
    yield HEAD
    for file in files:
        comments = Comments(file)
        for index, service in enumerate(file.service):
            yield from document_service(service, comments, SERVICE, index)
    for file in files:
        comments = Comments(file)
        yield f"## {file.name}\n"
        for index, message in enumerate(file.message_type):
            yield from document_message(message, message.name, comments, MESSAGE, index)
        for index, enum in enumerate(file.enum_type):
            yield from document_enum(enum, enum.name, comments, ENUM, index)


def document_service(service: ServiceDescriptorProto, comments: Comments, *path: int) -> Iterator[str]:
    yield f"## {service.name}\n\n{comments.text(*path)}\n"
    for index, method in enumerate(service.method):
        answer = "stream of " if method.server_streaming else ""
        yield f"### {service.name}.{method.name}\n"
        yield f"{link(method.input_type)} → {answer}{link(method.output_type)}\n"
        yield f"{comments.text(*path, MEMBER, index)}\n"


def document_message(message: DescriptorProto, name: str, comments: Comments, *path: int) -> Iterator[str]:
    yield f"### {name}\n\n{comments.text(*path)}\n"
    if message.field:
        yield "| field | type | |\n|---|---|---|"
        for index, field in enumerate(message.field):
            yield f"| `{field.name}` | {field_type(field, message)} | {comments.row(*path, FIELD, index)} |"
        yield ""
    for index, enum in enumerate(message.enum_type):
        yield from document_enum(enum, f"{name}.{enum.name}", comments, *path, NESTED_ENUM, index)
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from document_message(nested, f"{name}.{nested.name}", comments, *path, NESTED, index)


def document_enum(enum: EnumDescriptorProto, name: str, comments: Comments, *path: int) -> Iterator[str]:
    yield f"### {name}\n\n{comments.text(*path)}\n"
    yield "| value | number | |\n|---|---|---|"
    for index, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {comments.row(*path, MEMBER, index)} |"
    yield ""


def field_type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entry = next((each for each in message.nested_type if field.type_name.endswith("." + each.name)), None)
    if entry is not None and entry.options.map_entry:
        key, value = entry.field
        return f"map of {value_type(key)} to {value_type(value)}"
    text = value_type(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {text}"
    if field.proto3_optional:
        return f"optional {text}"
    if field.HasField("oneof_index"):
        return f"{text}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return text


def value_type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def link(type_name: str) -> str:
    name = type_name.removeprefix(PACKAGE)
    if name == type_name:
        return f"`{type_name.removeprefix('.')}`"
    return f"[{name}](#{name.replace('.', '').lower()})"


def main() -> None:
    page = "\n".join(document(read())).rstrip() + "\n"
    if "--check" not in sys.argv:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit("docs/api.md is out of date, run `make generate`")


if __name__ == "__main__":
    main()
