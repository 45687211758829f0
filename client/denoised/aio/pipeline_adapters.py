"""Adapters of a pipeline that lives in a daemon: diffusers' methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .. import adapter
from ..adapter import Scale
from ..v1 import adapter_pb2, pipeline_service_pb2


class AsyncPipelineAdapters:
    """Methods of a pipeline that change its adapters, with diffusers' names and arguments.

    What they change is the pipeline's own: others that share its components, and those that were derived from it, stay
    as they are. Each returns when the daemon has done it, and one that fails changes nothing.

    Files are read where the daemon runs: give a repository on the Hub or a directory that the daemon may read.
    """

    __slots__ = ()

    _info: pipeline_service_pb2.Pipeline

    async def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        weight_name: str = "",
        subfolder: str = "",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads a LoRA, which is in force from then on in place of others.

        Args:
            pretrained_model_name_or_path_or_dict: A repository on the Hub, or a directory that the daemon may read.
            adapter_name: What to call it. Defaults to "default_0", "default_1", …
            weight_name: The file, which ends in ".safetensors". Defaults to the one that diffusers would choose.
            subfolder: Folder inside the repository.
            revision: Branch, tag or commit. Defaults to "main".
            **kwargs: Other arguments of diffusers' method, which say how this process would read files.

        Raises:
            AdapterMismatchError: It was made for another family or size of model.
            LoadError: The file does not exist, may not be read, or is damaged.
        """
        adapter.check_ignored("load_lora_weights", kwargs)
        source = adapter.source_message(
            pretrained_model_name_or_path_or_dict, weight_name=weight_name, subfolder=subfolder, revision=revision or ""
        )
        await self._adapt("load_lora_weights", [source], adapter_name=adapter_name)

    async def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Scale | Sequence[Scale | None] | None = None
    ) -> None:
        """Says which LoRAs are in force, and how strong each is: one number for all, or one for each.

        Raises:
            AdapterNotFoundError: The pipeline has none of that name.
        """
        await self._adapt("set_adapters", adapter_names=adapter_names, adapter_weights=adapter_weights)

    async def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Adds the LoRAs in force, or those named, to the weights of the components.

        The pipeline then has those weights for itself, and they count as its own.
        """
        await self._adapt(
            "fuse_lora",
            components=components,
            lora_scale=lora_scale,
            safe_fusing=safe_fusing,
            adapter_names=adapter_names,
        )

    async def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Takes fused LoRAs out of the weights of the components again, as diffusers does: up to rounding."""
        await self._adapt("unfuse_lora", components=components)

    async def unload_lora_weights(self) -> None:
        """Lets go of all LoRAs. What is fused stays fused."""
        await self._adapt("unload_lora_weights")

    async def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Lets go of some LoRAs."""
        await self._adapt("delete_adapters", adapter_names=adapter_names)

    async def enable_lora(self) -> None:
        """Puts LoRAs in force again that were switched off."""
        await self._adapt("enable_lora")

    async def disable_lora(self) -> None:
        """Switches all LoRAs off."""
        await self._adapt("disable_lora")

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs in force."""
        return [loaded.name for loaded in self._info.adapters if loaded.active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the LoRAs that are loaded, by the components that they have weights for."""
        roles: dict[str, list[str]] = {}
        for loaded in self._info.adapters:
            for role in loaded.roles:
                roles.setdefault(role, []).append(loaded.name)
        return roles

    async def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str],
        token: str | Sequence[str] | None = None,
        tokenizer: str | None = None,
        text_encoder: str | None = None,
        *,
        weight_name: str = "",
        subfolder: str = "",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Teaches the pipeline's tokenizer and text encoder a token.

        Args:
            pretrained_model_name_or_path: A repository on the Hub, or a directory that the daemon may read.
            token: What to call it in prompts. Defaults to the name in the file.
            tokenizer: Role of the tokenizer, such as "tokenizer_2". Defaults to "tokenizer".
            text_encoder: Role of the text encoder, such as "text_encoder_2". Defaults to "text_encoder".
            weight_name: The file, which ends in ".safetensors". Defaults to the one that diffusers would choose.
            subfolder: Folder inside the repository.
            revision: Branch, tag or commit. Defaults to "main".
            **kwargs: Other arguments of diffusers' method, which say how this process would read files.

        Raises:
            AdapterMismatchError: It was made for a text encoder of another width, or the token is known.
            LoadError: The file does not exist, may not be read, or is damaged.
        """
        adapter.check_ignored("load_textual_inversion", kwargs)
        source = adapter.source_message(
            pretrained_model_name_or_path, weight_name=weight_name, subfolder=subfolder, revision=revision or ""
        )
        await self._adapt(
            "load_textual_inversion", [source], token=token, tokenizer=tokenizer, text_encoder=text_encoder
        )

    async def unload_textual_inversion(
        self,
        tokens: str | Sequence[str] | None = None,
        tokenizer: str | None = None,
        text_encoder: str | None = None,
    ) -> None:
        """Takes tokens that were taught away again, all of them when none is named."""
        await self._adapt("unload_textual_inversion", tokens=tokens, tokenizer=tokenizer, text_encoder=text_encoder)

    async def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        subfolder: str | Sequence[str],
        weight_name: str | Sequence[str],
        image_encoder_folder: str | None = "image_encoder",
        *,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads one or several IP-Adapters; `ip_adapter_image` of a call is then the picture to follow.

        Args:
            pretrained_model_name_or_path_or_dict: A repository on the Hub, or a directory that the daemon may read.
            subfolder: Folder inside the repository, one for each file or one for all.
            weight_name: Files, which end in ".safetensors".
            image_encoder_folder: Where the image encoder is: a folder beside the file, or one of the repository when it
                has a slash. None for calls that bring `ip_adapter_image_embeds`.
            revision: Branch, tag or commit. Defaults to "main".
            **kwargs: Other arguments of diffusers' method, which say how this process would read files.

        Raises:
            AdapterMismatchError: It was made for another family or size of model.
            LoadError: A file does not exist, may not be read, or is damaged.
        """
        adapter.check_ignored("load_ip_adapter", kwargs)
        sources = adapter.source_messages(
            pretrained_model_name_or_path_or_dict, subfolder, weight_name, revision=revision or ""
        )
        await self._adapt("load_ip_adapter", sources, image_encoder_folder=image_encoder_folder)

    async def set_ip_adapter_scale(self, scale: Scale | Sequence[Scale]) -> None:
        """How closely to follow the pictures: a number, or numbers by block, for all adapters or for each."""
        await self._adapt("set_ip_adapter_scale", scale=scale)

    async def unload_ip_adapter(self) -> None:
        """Lets go of the IP-Adapters."""
        await self._adapt("unload_ip_adapter")

    async def _adapt(self, method: str, sources: Sequence[adapter_pb2.AdapterSource] = (), **arguments: Any) -> None:
        """Has the daemon do one more thing to the adapters."""
        raise NotImplementedError
