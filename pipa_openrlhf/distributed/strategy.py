"""OpenRLHF's DeepSpeed strategy, made to run on CPU (gloo) as well as on CUDA, and which of them runs the job."""

import gc
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import FusedAdamBuilder
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from pipa_openrlhf.config import RunConfig
from pipa_openrlhf.distributed.upstream import Actor, DeepspeedStrategy
from pipa_openrlhf.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Gradients that are reduced together; DeepSpeed's default.
LARGEST_BUCKET = 500_000_000


def device() -> torch.device:
    """Device of this process: ``cuda:<local rank>`` or ``cpu``."""
    return torch.device(get_accelerator().current_device_name())


def on_cpu() -> bool:
    """True where DeepSpeed found no accelerator."""
    return get_accelerator().device_name() == "cpu"


def free_memory() -> int | None:
    """Bytes that this process can still allocate on its accelerator, its allocator's reserve included; None on CPU,
    and where two runs must do the very same products (``--train.full_determinism_enable``)."""
    if on_cpu() or torch.are_deterministic_algorithms_enabled():
        return None
    accelerator = get_accelerator()
    allocated = accelerator.memory_allocated()
    held = accelerator.memory_reserved() - allocated
    # DeepSpeed asks NVIDIA's driver for the devices of CUDA_VISIBLE_DEVICES, which may be names and in another order.
    is_cuda = accelerator.device_name() == "cuda"
    free = torch.cuda.mem_get_info()[0] if is_cuda else accelerator.available_memory()
    # An accelerator may count what the allocator holds as free already.
    return min(free + held, accelerator.total_memory() - allocated)


def dtype_of(name: str) -> torch.dtype:
    """``"bf16" | "fp16" | "fp32"`` to a torch dtype."""
    return _DTYPES[name]


def fastest_dtype() -> str:
    """``"bf16"``, or ``"fp32"`` on a CPU that multiplies matrices faster in it, as measured here and now.

    Without instructions for bf16 a CPU can be a hundred times slower in it than in float32.
    """
    if not on_cpu():
        return "bf16"
    return min(("bf16", "fp32"), key=lambda name: _seconds_a_product(dtype_of(name)))


def slow_dtype_hint(name: str) -> str | None:
    """A line for a user whose CPU is slower in the data type they chose; None otherwise."""
    if name == "bf16" and fastest_dtype() == "fp32":
        return "bf16 is slower than float32 on this CPU, often many times: --ds.param_dtype fp32 is faster here"
    return None


def _seconds_a_product(dtype: torch.dtype) -> float:
    left, right = torch.ones(64, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one sets the kernel up
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


class Strategy(DeepspeedStrategy):
    """DeepspeedStrategy without its CUDA-only calls; gradient scaling and accumulation belong to our trainer.

    Args:
        settings: of the run.
        value_lr: learning rate of the value head; None: the policy's.
    """

    def __init__(self, settings: RunConfig, value_lr: float | None = None):
        super().__init__(
            seed=settings.train.seed,
            full_determinism=settings.train.full_determinism_enable,
            max_norm=settings.max_norm,
            micro_train_batch_size=1,
            train_batch_size=1,
            zero_stage=settings.ds.zero_stage,
            args=settings,
        )
        self.value_lr = settings.adam.lr if value_lr is None else value_lr
        self.num_trained = LARGEST_BUCKET

    def setup_distributed(self, timeout: timedelta = timedelta(minutes=60)) -> None:
        """Seed this process and join the process group; without a launcher, become a group of one."""
        if self.full_determinism:
            transformers.enable_full_determinism(self.seed)
        else:
            transformers.set_seed(self.seed)
        if self.args.local_rank != -1:
            os.environ["LOCAL_RANK"] = str(self.args.local_rank)
        if "RANK" not in os.environ:
            os.environ.update(
                RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
            )
        if on_cpu():
            _compile_nothing()
            _wait_for_every_gather()
        else:
            get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(timeout=timeout)
        self.world_size = dist.get_world_size()
        data_parallel = self.world_size // self.ds_tensor_parallel_size
        self.ds_device_mesh = init_device_mesh(
            device().type, (data_parallel, 1, self.ds_tensor_parallel_size), mesh_dim_names=("dp", "sp", "tp")
        )
        self.setup_ring_attn(self.ds_device_mesh)

    def _ds_init_train_model(self, model: Actor, cfg: dict):
        trained = (one for one in model.model.parameters() if one.requires_grad)
        self.num_trained = sum(getattr(one, "ds_numel", one.numel()) for one in trained)
        model, optimizer, scheduler = super()._ds_init_train_model(model, cfg)
        if self.stage in (1, 2) and self._gradient_dtype() == "fp32":
            _accumulate_in_float32(optimizer)
        _leave_out_non_finite_updates(optimizer)
        # ZeRO-0 in bf16 creates its moments by an update with zero gradients, which Adam's bias correction counts.
        for state in getattr(optimizer, "optimizer", optimizer).state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].zero_()
        return model, optimizer, scheduler

    def get_ds_train_config(self, optim_dict: dict | None = None, *, max_norm: float | None = None) -> dict:
        """Upstream's config with micro-batch 1 and accumulation 1: the trainer scales the loss of a micro-batch by
        the counts of its global batch, and says itself which backward pass ends it."""
        if optim_dict is not None and optim_dict["type"] == "AdamW":
            # DeepSpeed compiles its own optimizers at first use, and a killed first run leaves a lock that hangs the
            # next; under ZeRO-0 its fused one flattens the master weights, which checkpoints need by parameter.
            optim_dict["params"].update(torch_adam=True, fused=True)
        config = super().get_ds_train_config(optim_dict, max_norm=max_norm)
        config.update(
            train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, train_batch_size=self.world_size
        )
        # DeepSpeed allocates the whole bucket, a gigabyte by default, even where LoRA's gradients fill a tenth of it.
        config["zero_optimization"]["reduce_bucket_size"] = min(self.num_trained, LARGEST_BUCKET)
        # At ZeRO-1 it would bring in another optimizer, see _accumulate_in_float32.
        config["data_types"]["grad_accum_dtype"] = self._gradient_dtype() if self.stage != 1 else None
        if self.stage == 1 and self._gradient_dtype() == "fp32":
            config["communication_data_type"] = "fp32"  # what was added up in float32 is not rounded before its sum
        return config

    def _gradient_dtype(self) -> str | None:
        """Data type in which the gradients of a step's micro-batches add up: float32 unless told otherwise, as bf16
        is off by percents after some hundred of them. Without ZeRO, and in CPU memory below ZeRO-3, DeepSpeed cannot.
        """
        asked = self.args.ds.grad_accum_dtype
        can = self.stage == 3 or (self.stage > 0 and not self.adam_offload)
        return "fp32" if asked is None and self.args.ds.param_dtype == "bf16" and can else asked

    @property
    def adds_up_in_bf16(self) -> bool:
        """Whether the gradients of micro-batches add up in bf16."""
        return self.args.ds.param_dtype == "bf16" and self._gradient_dtype() in (None, "bf16")

    def get_ds_eval_config(self, offload: bool = False) -> dict:
        """Upstream's inference config with the same nominal batch."""
        config = super().get_ds_eval_config(offload)
        config.update(train_micro_batch_size_per_gpu=1, train_batch_size=self.world_size)
        return config

    def _get_model_parameters(self, model: torch.nn.Module, *, optim: str | None = None, weight_decay: float = 0.0):
        raw_model, groups = super()._get_model_parameters(model, optim=optim, weight_decay=weight_decay)
        if optim == "muon":
            return raw_model, groups
        value_head = {id(parameter) for name, parameter in raw_model.named_parameters() if "value_head." in name}
        split = []
        for group in groups:
            for of_head, lr in ((False, self.args.adam.lr), (True, self.value_lr)):
                parameters = [one for one in group["params"] if (id(one) in value_head) == of_head]
                if parameters:
                    split.append({"params": parameters, "weight_decay": group["weight_decay"], "lr": lr})
        return raw_model, split

    def backward(self, loss: torch.Tensor, model: Actor, is_last: bool) -> None:
        """Add the gradient of a micro-batch's share of the global loss; ``is_last`` ends the global batch.

        DeepSpeed averages gradients over ranks while the shares are to be summed, hence the factor.
        """
        model.model.set_gradient_accumulation_boundary(is_last)
        model.model.backward(loss * self.world_size)

    def free(self, model: Actor) -> None:
        """Destroy a prepared model's engine, so that nothing holds its weights."""
        module = model.model.module
        model.model.destroy()
        model.model = None
        # ZeRO-3 pushes the whole module here once an engine, and nothing takes it off.
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [one for one in stack if one is not module]
        # A cache around a method of its coordinators, inside another decorator, remembers every submodule.
        for member in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(member, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()
        del module
        gc.collect()

    def all_reduce(self, data: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Sum or maximum of a tensor over all ranks, in place."""
        dist.all_reduce(data, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return data

    def least_free_memory(self) -> int | None:
        """:func:`free_memory` of the rank that has least; None on CPU. A collective call."""
        free = free_memory()
        if free is None:
            return None
        return -int(self.all_reduce(torch.tensor(-free, device=device()), op="max"))

    def from_rank_0(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns on rank 0, or the error that it meets there, on every rank. A collective call.

        Raises:
            UserError: rank 0 met it, or an OSError.
        """
        outcome: list[Any] = [None, None]
        if self.is_rank_0():
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
            except OSError as error:
                outcome[1] = f"{error.strerror}: {error.filename}" if error.strerror else str(error)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


def _compile_nothing() -> None:
    """Keep DeepSpeed on CPU from compiling what it can do without, which takes a compiler and minutes of its time.

    That is a collective over shared memory, which gloo replaces, and the Adam of Muon's other parameters, in whose
    place Muon computes it in torch.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def refuse(self, verbose: bool = True) -> None:
        raise RuntimeError("it is not compiled on CPU")

    FusedAdamBuilder.jit_load = refuse


def join_launched_group(local_rank: int) -> tuple[int, int]:
    """Rank and number of ranks that a launcher gave this process, which joins their group; 0 and 1 without one.

    Args:
        local_rank: as the deepspeed launcher's flag has it; -1: that of the environment.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not on_cpu():
        get_accelerator().set_device(local_rank if local_rank != -1 else int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size()


def _wait_for_every_gather() -> None:
    """Keep ZeRO-3 from computing with weights that are still on their way.

    After an update DeepSpeed 0.19.6 gathers many parameters at once and waits for the last gather only. That is enough
    on an accelerator's stream; gloo's gathers finish in any order. One at a time, each is the last.
    """
    gather = Init._allgather_params_coalesced
    if gather.__module__ == __name__:
        return

    def one_by_one(self, param_list, hierarchy=0, quantize=False) -> None:
        for parameter in param_list:
            gather(self, [parameter], hierarchy, quantize)

    Init._allgather_params_coalesced = one_by_one


def _accumulate_in_float32(optimizer) -> None:
    """Make a ZeRO-1 or ZeRO-2 optimizer add up the gradients of micro-batches in float32.

    DeepSpeed 0.19.6 takes that setting and drops it at ZeRO-2, and at ZeRO-1 changes to another optimizer, which stops
    at a gradient of zero and has no check for NaN; the code paths are there in this one, but at ZeRO-1 it sums a bf16
    copy over the ranks and goes on with the gradients of its own rank.
    """
    optimizer.gradient_accumulation_dtype = torch.float32
    if not optimizer.partition_gradients:
        optimizer.use_separate_grad_accum = optimizer.use_grad_accum_attribute = True
        optimizer.get_gradient_for_reduction = lambda parameter: parameter.grad_accum
        optimizer.contiguous_gradients = False  # its buffers are bf16

        def reduce_all(rank: int | None, gradients: list[torch.Tensor], dtype: torch.dtype, elements_per_buffer: int):
            # Without the sorting by data types of before it, which knows no tensor of a CPU and drops it.
            optimizer.allreduce_no_retain(gradients, dtype, numel_per_bucket=elements_per_buffer, rank=rank)

        optimizer.buffered_reduce_fallback = reduce_all
        return
    as_reduced = optimizer.get_all_grad_tensors

    def in_float32(parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
        return [gradient.to(dtype) for gradient in as_reduced(parameters, dtype)]

    optimizer.get_all_grad_tensors = in_float32


def _leave_out_non_finite_updates(optimizer) -> None:
    """Let a ZeRO optimizer skip an update with a NaN or infinite gradient, as it does in float16: the trainer counts
    such steps."""
    if hasattr(optimizer, "check_grad_overflow"):
        optimizer.check_grad_overflow = True
    elif hasattr(optimizer, "_overflow_check_and_loss_scale_update") and optimizer.dtype != torch.float16:
        if hasattr(optimizer, "_loss_scale_update_and_overflow_cleanup"):
            return  # a ZeRO-3 optimizer of DeepSpeed 0.19.8, which skips an update with such a norm by itself
        update_scale = optimizer._overflow_check_and_loss_scale_update

        def check_first() -> bool:
            optimizer.check_overflow()
            return update_scale()

        optimizer._overflow_check_and_loss_scale_update = check_first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
