"""What a model's config.json asks of this installation: packages for quantized weights, an attention that there is."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import is_kernels_available

from ..tuner.checks import shown
from ..utils import one_line, said_by


def quantization_of(config: PretrainedConfig) -> Any:
    """What `config` says of quantized weights, as transformers looks for it; `None` if it says nothing."""
    return getattr(config, "quantization_config", getattr(config.get_text_config(), "quantization_config", None))


def check_needs(model: PreTrainedModel, attention: str | None, named: str, which: str) -> None:
    """Refuse, as loading would, what cannot be loaded or computed here.

    Args:
        model: The skeleton.
        attention (`str`, *optional*): The attention that its config.json names.
        named, which (`str`): What a message calls it, and the argument that it is passed as.

    Raises:
        OSError: If a package is missing, or a setting names what there is not.
    """
    quantization = quantization_of(model.config)
    if quantization is not None:
        quantizer = None
        try:
            if AutoHfQuantizer.supports_quant_method(quantization):  # others it leaves out, with a warning
                quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
                quantizer.validate_environment(device_map=None, weights_only=True)
        except ImportError as error:
            raise missing_package(error, model.config, named, which) from error
        except Exception as error:  # a configuration may say anything
            if quantizer is None:
                raise _to_correct("quantization_config", quantization, error, named) from error
            raise OSError(
                f"{named} is quantized and cannot be loaded here ({one_line(error)}): pass the unquantized model as "
                f"`{which}`."
            ) from error
    # Others lie on the hub, as code; transformers takes some from there instead of what is not installed.
    if attention is None or "/" in str(attention) or getattr(model, "_compatible_flash_implementations", None):
        return
    try:
        model.get_correct_attn_implementation(str(attention).removeprefix("paged|"), is_init_check=True)
    except ImportError as error:
        if not is_kernels_available():
            raise missing_package(error, None, named, which) from error
    except ValueError as error:
        raise _to_correct("attn_implementation", attention, error, named) from error


def missing_package(error: ImportError, config: PretrainedConfig | None, named: str, which: str) -> OSError:
    """What to say of a package without which a model cannot be loaded."""
    needs, instead = "needs a package that is", "load the model without it and pass the object"
    if config is not None and quantization_of(config) is not None:
        needs, instead = "is quantized and the package that loads it is", "pass the unquantized model"
    return OSError(f"{named} {needs} missing ({one_line(error)}): install it, or {instead} as `{which}`.")


def _to_correct(name: str, value: Any, error: Exception, named: str) -> OSError:
    why = f"its config.json cannot be used ({said_by(error)}): correct `{name}` ({shown(value)}) in it."
    return OSError(f"{named} could not be loaded: {why}")
