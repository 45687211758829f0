"""Trains the embedded demo checkpoint: small pictures of everyday things, from their names.

Data: the glyphs of Noto Color Emoji (SIL Open Font License), captioned by their Unicode names. A fifth of the time goes
to the autoencoder, the most to the text encoder and UNet together, and what is left to sharpening the decoder once the
latents are settled.

    apt-get install fonts-noto-color-emoji
    python -m denoised_server.demo.train OUT_DIR --minutes 100 --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIZE = 64
PICTURE_SIZE = 60  # leaves a margin around the glyph
MAX_TOKENS = 32

# What people ask a demo for: food, plants, animals, faces, vehicles, buildings, weather, sports and things.
PICTURES = (
    "🍇🍈🍉🍊🍋🍌🍍🥭🍎🍐🍒🍓🫐🥝🍅🥥🥑🍆🥕🌽🥒🥬🥦🧄🍄🍞🥐🥖🥨🧇🧀🍗🍔🍟🍕🌭🥪🌮🥚🥗🍿🍙🍚🍜🍝"
    "🦀🦞🦐🦑🍦🍩🍪🎂🧁🍫🍭🍯🍼🍷🍺🥤🧊"
    "🌹🌻🌷🌲🌴🌵🌿🍀🍁"
    "🐵🐶🐺🦊🐱🦁🐯🐴🦄🐮🐷🐭🐰🐻🐨🐼🐸🐲🦍🦌🐑🐪🦒🐘🦇🦘🐥🐦🐧🦅🦢🦉🦩🦚🦜🐊🐢🦎🐍🐳🐬🐟🐡🦈🐙🐌"
    "🦋🐛🐝🐞"
    "😀😂😇😍😎😐😡😢😭🤓🤖🤠🥳👻👽🤡💩🎃💀"
    "🚗🚕🚑🚒🚓🚚🚜🚲🚂🚀🚁🚤🚢🛸"
    "🏠🏭🏰🗼🗽⛪🎡🎪"
    "🌈🌞🌟🌊🌋🔥💧⛄⚡"
    "⚽🏀⚾🎱🎳🥊🎯🏆🥇"
    "🎈🎁🎨🎤🎧🎷🎸🎹🎺🎲🧩🧸"
    "👑👓👕👖👗👜👟👠👢🎒💄💎"
    "📷📱💻🔋🔌💡🔦📖📚📫🔑🔒🧲🔬💊🧹🪑🛁⏰⌛✂🎵❤💔💣💰🔔🚦🛑🧭🌍🗿"
)

# Said around the caption, so that a prompt may be a phrase. Filler teaches the model to pass over unknown words.
PHRASES = ("{}", "{}", "{}", "a {}", "the {}", "a picture of a {}", "an image of {}", "{} on white", "a small {}")


def caption(character: str) -> str:
    return unicodedata.name(character).lower().replace("-", " ")


def render(character: str, size: int, offset: tuple[int, int]) -> Image.Image:
    """The glyph on white, `size` pixels wide, its corner moved by `offset` from where centring puts it."""
    # The font holds pictures of 136 x 128 pixels for this one size.
    glyph = Image.new("RGB", (136, 136), "white")
    font = ImageFont.truetype(FONT, 109)
    ImageDraw.Draw(glyph).text((0, 4), character, font=font, embedded_color=True)
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    corner = (SIZE - size) // 2
    picture.paste(glyph.resize((size, size), Image.Resampling.LANCZOS), (corner + offset[0], corner + offset[1]))
    return picture


def pixels(picture: Image.Image) -> torch.Tensor:
    """In [-1, 1], shape (3, 64, 64)."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(SIZE, SIZE, 3).permute(2, 0, 1).float() / 127.5 - 1


def variations(character: str, count: int) -> torch.Tensor:
    """The picture itself, then slightly moved and smaller ones; shape (count, 3, 64, 64)."""
    choice = random.Random(character)
    made = [render(character, PICTURE_SIZE, (0, 0))]
    while len(made) < count:
        size = choice.randint(PICTURE_SIZE - 6, PICTURE_SIZE + 2)
        made.append(render(character, size, (choice.randint(-2, 2), choice.randint(-2, 2))))
    return torch.stack([pixels(picture) for picture in made])


def learning_rate(done: float, step: int) -> float:
    return 1e-3 * min(1, (step + 1) / 200) * (0.5 * (1 + math.cos(math.pi * done)) + 0.005)


def difference(made: torch.Tensor, meant: torch.Tensor) -> torch.Tensor:
    """Between pictures, by pixels and by edges."""
    edges = sum(F.l1_loss(made.diff(dim=axis), meant.diff(dim=axis)) for axis in (2, 3))
    return F.l1_loss(made, meant) + 0.5 * F.mse_loss(made, meant) + edges


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, seconds: float) -> None:
    """Both halves, on the pictures and their mirror images; sets the scaling factor, as of Rombach et al., 2022."""
    optimizer, start, step = torch.optim.AdamW(vae.parameters()), time.monotonic(), 0
    while (done := (time.monotonic() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(done, step)
        batch = pictures[torch.randint(0, len(pictures), (16,))]
        if random.random() < 0.5:
            batch = batch.flip(-1)
        posterior = vae.encode(batch).latent_dist
        loss = difference(vae.decode(posterior.sample()).sample, batch) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    print(f"VAE: {step} steps, loss {loss.item():.3f}", flush=True)
    vae.register_to_config(scaling_factor=float(1 / encode(vae, pictures).std()))


def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents, not scaled; shape (pictures, 4, 16, 16)."""
    with torch.no_grad():
        return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])


def sharpen_decoder(vae: AutoencoderKL, latents: torch.Tensor, pictures: torch.Tensor, seconds: float) -> None:
    """Trains the decoder alone, on latents as noisy as a denoised one is; the UNet keeps its latents.

    `latents` are the VAE's own, not scaled; shape (pictures, 4, 16, 16).
    """
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer, start, step = torch.optim.AdamW(decoder), time.monotonic(), 0
    noise = 0.05 * latents.std()
    while (done := (time.monotonic() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(done, step)
        chosen = torch.randint(0, len(pictures), (16,))
        loss = difference(
            vae.decode(latents[chosen] + noise * torch.randn_like(latents[chosen])).sample, pictures[chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    print(f"decoder: {step} steps, loss {loss.item():.3f}", flush=True)


def make_tokenizer(captions: list[str], folder: Path) -> tuple[CLIPTokenizer, int]:
    """A byte-pair vocabulary in which each word of the captions is one token, and any other word is its letters."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary: dict[str, None] = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    merges: dict[str, None] = {}
    words = {word for text in [*captions, *PHRASES] for word in text.replace("{}", "").split()}
    for word in sorted(words):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[f"{parts[0]} {parts[1]}"] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary[parts[0]] = None
    tokens = [*vocabulary, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    return tokenizer, len(tokens)


def phrase(text: str) -> str:
    """The caption as somebody might say it; one in ten is empty, for classifier-free guidance."""
    if random.random() < 0.1:
        return ""
    said = random.choice(PHRASES).format(text)
    if random.random() < 0.25:
        filler = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 7)))
        said = f"{filler} {said}" if random.random() < 0.5 else f"{said} {filler}"
    return said


def new_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Not trained yet; the tokenizer's files go into the folder."""
    tokenizer, size = make_tokenizer([caption(character) for character in PICTURES], folder / "tokenizer")
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(24, 48, 64),
            latent_channels=4,
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            sample_size=SIZE,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=96,
                intermediate_size=192,
                num_attention_heads=4,
                num_hidden_layers=2,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=size - 2,
                eos_token_id=size - 1,
                pad_token_id=size - 1,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(48, 96, 160),
            layers_per_block=1,
            cross_attention_dim=96,
            attention_head_dim=4,
            norm_num_groups=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        # DDPM's linear betas leave almost no signal at the last step, so white backgrounds stay white; predicting the
        # velocity keeps the target well scaled there (Salimans & Ho, 2022).
        scheduler=DDIMScheduler(
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule="linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_unet(pipeline: StableDiffusionPipeline, latents: torch.Tensor, seconds: float) -> None:
    """The UNet and the text encoder together; leaves their average over the last steps, which is what denoises best.

    `latents` are scaled; shape (captions, variations, 4, 16, 16).
    """
    unet, text_encoder, tokenizer, noiser = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler
    captions = [caption(character) for character in PICTURES]
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.99))
    start, step, running, batch = time.monotonic(), 0, 0.0, 32
    while (done := (time.monotonic() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate(done, step)
        chosen = torch.randint(0, len(latents), (batch,))
        clean = latents[chosen, torch.randint(0, latents.shape[1], (batch,))]
        said = [phrase(captions[index]) for index in chosen.tolist()]
        tokens = tokenizer(said, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        t, noise = torch.randint(0, 1000, (batch,)), torch.randn_like(clean)
        guess = unet(
            noiser.add_noise(clean, noise, t), t, encoder_hidden_states=text_encoder(tokens.input_ids)[0]
        ).sample
        loss = F.mse_loss(guess, noiser.get_velocity(clean, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        running = 0.99 * running + 0.01 * loss.item()
        decay = min(0.999, (1 + step) / (10 + step))
        for mean, parameter in zip(average, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - decay)
        if step % 100 == 0:
            print(f"UNet: {done:.0%}, step {step}, loss {running:.4f}", flush=True)
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)
    print(f"UNet: {step} steps of {batch}", flush=True)


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    # The text encoder stays as it is: transformers reads it in its own element type where diffusers reads float32.
    for module in (pipeline.unet, pipeline.vae):
        module.half()
    pipeline.save_pretrained(folder)
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        # Where this machine had the checkpoint that training went on from is nobody's business.
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", type=Path, help="a checkpoint of this script's to go on from; its encoder stays")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)
    seconds = 60 * arguments.minutes
    pictures = torch.stack([variations(character, 12) for character in PICTURES])
    flat = pictures.flatten(0, 1)
    if arguments.start is None:
        pipeline = new_pipeline(arguments.out)
        train_vae(pipeline.vae, flat, 0.2 * seconds)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(arguments.start, torch_dtype=torch.float32)
    latents = encode(pipeline.vae, flat)
    scaled = (latents * pipeline.vae.config.scaling_factor).unflatten(0, pictures.shape[:2])
    train_unet(pipeline, scaled, (0.65 if arguments.start is None else 0.8) * seconds)
    sharpen_decoder(pipeline.vae, latents, flat, (0.15 if arguments.start is None else 0.2) * seconds)
    save(pipeline, arguments.out)


if __name__ == "__main__":
    main()
