"""Pipelines that make sound."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    AutoencoderSAME,
    CosineDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3DiTModel,
    StableAudio3Pipeline,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
)

from tests.checkpoints import ddim

from . import encoders, tokenizers
from .family import Family
from .weights import filled


def audioldm2(folder: Path) -> None:
    roberta, t5 = tokenizers.roberta(), tokenizers.t5()
    text = {
        "hidden_size": 8,
        "intermediate_size": 37,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "pad_token_id": roberta.pad_token_id,
        "vocab_size": len(roberta),
        "projection_dim": 8,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": 37,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "projection_dim": 8,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    language_model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=1000, n_positions=99, bos_token_id=0, eos_token_id=0)
    )
    language_model.config.max_new_tokens = 8
    AudioLDM2Pipeline(
        unet=AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=32,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=(8, 16),
        ),
        scheduler=ddim(),
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            in_channels=1,
            out_channels=1,
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
        text_encoder=ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16)).eval(),
        tokenizer=roberta,
        feature_extractor=ClapFeatureExtractor(hop_length=7900),
        text_encoder_2=encoders.t5(t5),
        tokenizer_2=t5,
        language_model=language_model.eval(),
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=encoders.WIDTH, langauge_model_dim=16
        ),
        vocoder=SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=8,
                sampling_rate=16000,
                upsample_initial_channel=16,
                upsample_rates=[2, 2],
                upsample_kernel_sizes=[4, 4],
                resblock_kernel_sizes=[3, 7],
                resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
                normalize_before=False,
            )
        ).eval(),
    ).save_pretrained(folder)


def stable_audio(folder: Path) -> None:
    tokenizer = tokenizers.t5(25)
    StableAudioPipeline(
        transformer=filled(
            StableAudioDiTModel(
                sample_size=4,
                in_channels=3,
                num_layers=2,
                attention_head_dim=4,
                num_key_value_attention_heads=2,
                out_channels=3,
                cross_attention_dim=4,
                time_proj_dim=8,
                global_states_input_dim=8,
                cross_attention_input_dim=4,
            )
        ),
        scheduler=CosineDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        vae=AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=encoders.WIDTH, conditioning_dim=4, min_value=0, max_value=32
        ),
    ).save_pretrained(folder)


def stable_audio_3(folder: Path) -> None:
    tokenizer = tokenizers.gemma(64)
    module = T5GemmaModuleConfig(
        **encoders.decoder(tokenizer),
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=64,
        layer_types=["full_attention"] * 2,
    ).to_dict()
    StableAudio3Pipeline(
        transformer=filled(
            StableAudio3DiTModel(
                io_channels=8,
                patch_size=1,
                embed_dim=32,
                depth=2,
                num_heads=4,
                cond_token_dim=encoders.WIDTH,
                global_cond_dim=encoders.WIDTH,
                local_add_cond_dim=5,
                timestep_features_dim=16,
                ff_mult=2,
                num_memory_tokens=3,
                use_differential_attention=False,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        vae=filled(
            AutoencoderSAME(
                audio_channels=2,
                patch_size=2,
                encoder_channels=8,
                encoder_c_mults=(2,),
                encoder_strides=(2,),
                encoder_transformer_depths=(1,),
                latent_dim=8,
                use_differential_attention=False,
                dim_heads=4,
                ff_mult=2,
                sampling_rate=16,
            )
        ),
        tokenizer=tokenizer,
        text_encoder=T5GemmaEncoderModel(
            T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
        ).eval(),
        duration_embedder=StableAudio3DurationEmbedder(output_dim=encoders.WIDTH, fourier_dim=16),
    ).save_pretrained(folder)


def longcat(folder: Path) -> None:
    tokenizer = tokenizers.t5()
    LongCatAudioDiTPipeline(
        vae=LongCatAudioDiTVae(
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=24000,
        ),
        text_encoder=encoders.umt5(tokenizer),
        tokenizer=tokenizer,
        transformer=filled(
            LongCatAudioDiTTransformer(
                dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=encoders.WIDTH, latent_dim=8, text_conv=False
            )
        ),
    ).save_pretrained(folder)


FAMILIES = [
    Family("audioldm2", audioldm2, arguments={"audio_length_in_s": 0.02}),
    Family("stable-audio", stable_audio, arguments={"audio_end_in_s": 2.0}),
    Family("stable-audio-3", stable_audio_3, arguments={"duration": 1.0}),
    Family("longcat-audio-dit", longcat, arguments={"audio_duration_s": 0.1}),
]
