"""Which tests are quick, which `make test` runs, and which only `make test-all` and CI run.

A pattern is searched for in the name of a test, as "test_ops::test_meets_its_contract[rope-bf16-0-cuda]".
What repeats a check in one more dtype, language, format, schedule or process is what the smaller sets leave
out. Left out altogether are builds with sanitizers, sums between two processes (but for what fails there), a
copy of the lab with more ops, the whole step's code for a GPU, the demo and the examples as programs, the
commands of the course, and the published page in a browser. On two idle threads of one core quick takes 2
minutes, `make test` 6.
"""

import re

# Run by `make test-all` and CI alone.
SLOW = (
    # A copy of the lab is built, or sources are compiled with a fault in them.
    "^test_add_an_op::",
    "^test_add_a_format::",
    "^test_kernels_package::test_its_binding_calls_the_kernels",
    "^test_exchange_judge::test_a(n_exported_cuda_kernel|_cuda_solution_that_remembers)",
    "^test_mutants::test_a_planted_fault_is_killed",
    "^test_synchronisation::test_a_(kernel_that_never_waits|barrier_between_two_thresholds)",
    # A file is compiled for each, which takes two seconds: both languages run some.
    r"^test_judge::test_a_cheat_is_caught_by_its_name\[(?!half-|overrun-|hangs-).*\.cu",
    r"^test_judge::test_a_cheat_is_caught_by_its_name\[(no_kernel|spoils|patches|other|exits|rounds|half_s).*\.py",
    r"^test_judge::test_an_honest_kernel_is_judged_honest\[(?!cuda_src/rmsnorm|triton_kernels/rmsnorm|small)",
    r"^test_exercises::test_fault_is_caught_and_solution_passes\[(?!barrier|tail_mask).*-cuda",
    r"^test_exercises::test_a_change_that_mends_nothing_fails\[(?!barrier).*-cuda",
    r"^test_own_kernel::test_a_copy_passes_every_case\[\.cu",
    r"^test_own_kernel::test_a_wrong_kernel_fails_and_the_built_in_ones_stay\[\.cu",
    # Another schedule of the threads, or another order of a fence.
    r"^test_synchronisation::test_a_thread_far_ahead.*highest",
    r"^test_synchronisation::test_what_the_kernel_before_writes.*-cpu",
    "^test_host::test_(race_detector|address_sanitizer)",
    # Several processes that import torch.
    "^test_exchange_of_processes::test_all_kinds_of_sums",
    "^test_parallel_formats::test_tokens_of_packed_weights_are_those_of_one_process",
    "^test_rank_faults::test_(a_rank_that_(fails_between_two_steps|never_starts)|no_rank_outlives|ranks_with_diff)",
    "^test_ranks::test_(a_run_on_two_ranks|tokens_are_those_of_one_process)",
    "^test_course::test_commands_run",
    # The published page, drawn anew and looked at in a browser; pages of many rows.
    "^test_report_page::",
    "^test_report::test_in_chromium",
    "^test_report::test_ten_thousand_rows",
    "^test_report_records::",
    "^test_untuned::",
    # Programs as a user runs them, from a process of their own.
    "^test_examples::",
    "^test_demo::",
    "^test_interpreter::test_works_with_triton_interpret_set",
    "^test_api::test_a_real_model",
    "^test_faults_a::test_a_real_process",
    "^test_cli::test_(the_mistake_in_a_real_process|a_shell_completes|a_reader_that_goes_away)",
    # Limits on processor time, waited for.
    r"^test_text_faults::test_a_hostile_chat_template.*for i in range",
    # Code for a GPU, compiled and read.
    "^test_triton_fused::test_(compiles_for_sm_80|float32_stays_off)",
    r"^test_triton_compile::.*(sm_80|-step-|of_several_formats)",
    "^test_inspect::test_json_schema",
    "^test_inspect::test_every_op_can_be_looked_at.*decode_step-triton",
    "^test_triton_step::test_weights_are_on_their_way_before_every_wait",
    "^test_tune::test_(a_whole_run_with_a_made_up_gpu|compilers_are_processes)",
    # Further formats, sizes, dtypes and draws.
    r"^test_ops::.*\[decode_step-bf16-(?![01]-)\d+-(torch|gpu_shapes)",
    r"^test_ops::.*\[decode_step-bf16-(9|1\d)-(triton|gpu_shapes)",
    r"^test_ladder::test_rung_agrees.*(decode_attention|quantised).*-triton",
    r"^test_ops::.*\[decode_step-bf16-(3|21|22|23|25|26|27|29)-",
    r"^test_gpu_shapes::test_sizes_that_only_streams_notice.*fp32",
    r"^test_persistent::test_plans_agree.*dtype0",
    r"^test_synchronisation::test_a_thread_far_ahead.*(-([4-9]|\d\d)-|decode_step-3)",
    r"^test_synchronisation::test_what_the_kernel_before_writes.*-([4-9]|\d\d)-",
    r"^test_persistent::test_packed_weights.*layers[1-4]",
    r"^test_persistent::test_q_k_and_v_of_several_formats.*\[(?!Q4_K_M)",
    r"^test_persistent::test_an_id_outside_the_vocabulary.*--1\]",
    r"^test_quantised_checkpoints::test_a_checkpoint_keeps.*(?<!0)\]",
    "^test_rungs_judged::test_every_rung",
    "^test_stored_weights::",
    r"^test_triton_packed::test_(tiles_are_shared_out|embedding_reads_codes).*(fp8|mxfp4|q[46]_k|int8-|g128)",
    r"^test_quantised_model::test_q_k_and_v_of_several_formats_are_kept_apart",
    "^test_sampling::test_top_p_is_exact.*-triton",
    "^test_harness::test_every_step_of_a_made_up_gpu",
    "^test_records::test_reading_costs",
    "^test_kv_formats::test_fp8_by_the_conversion_of_a_gpu",
    "^test_dispatch::test_a_decode_step_pays",
    "^test_api::test_import_lab",
    "^test_torch_ops::test_an_op_passes_torchs_own_check",
    r"^test_text_faults::test_end_of_turn_tokens.*\[[2-5]\]",
)

# The same, on a machine without a GPU: there float16 differs from bfloat16 by the type of a number, and one
# interpreter or reference serves every dtype.
SLOW_ON_A_CPU = (
    r"^test_ops::.*-fp16-(?![01]-)",
    r"^test_ops::.*\[(?!sample).*-fp32-\d+-gpu_shapes",
    r"^test_ops::.*-fp32-(?![01]-)\d+-(torch|triton)",
)

# Not quick, beside those that are slow: they compile programs, run sanitizers, emulate a GPU's shapes,
# compile Triton kernels for GPUs, interpret whole models, open a browser or start processes with torch.
NOT_QUICK = (
    "^test_a_third_language::",
    "^test_cli::",
    "^test_course::",
    "^test_exchange_judge::",
    "^test_exchange_of_processes::",
    "^test_exercises::",
    "^test_extension::",
    "^test_faults_a::",
    "^test_faults_b::",
    "^test_fused::",
    "^test_gpu_check::",
    "^test_gpu_shapes::",
    "^test_harness::",
    "^test_host::",
    "^test_inspect::",
    "^test_interpreter::",
    "^test_judge::",
    "^test_kernels_package::",
    "^test_ladder::",
    "^test_model::",
    "^test_mutants::",
    "^test_new::",
    "^test_oracle::",
    "^test_own_kernel::",
    "^test_parallel_formats::",
    "^test_persistent::",
    "^test_persistent_kv::",
    "^test_rank_faults::",
    "^test_ranks::",
    "^test_report::",
    "^test_sampling::",
    "^test_synchronisation::",
    "^test_text_faults::",
    "^test_triton_compile::",
    "^test_triton_fused::",
    "^test_triton_step::",
    "^test_tune::",
    # Of files whose other tests are quick.
    r"^test_ops::.*-gpu_shapes",
    r"^test_ops::.*\[decode_step",
    r"^test_ops::.*-fp(16|32)-(?![01]-).*-(torch|triton)",
    r"^test_ops::.*-([4-9]|\d\d)-triton",
    "^test_user_sampling::test_rows_draw",
    "^test_matrix::test_the_compiled_peer",
    "^test_triton_packed::test_(tiles_are|embedding_reads|codes_go_from|the_fused_products)",
    "^test_quantised_model::test_bench_records",
    "^test_serving_bench::",
    "^test_solutions::",
    "^test_dispatch::test_no_call_costs",
    "^test_format_bench::",
    "^test_bad_records::test_(report_leaves|no_file_outside|a_line_that_another)",
    "^test_exchange_format::",
    "^test_requests::test_no(body_reaches|_verb_writes)",
    "^test_queue::test_tokens_do_not",
    "^test_quantised_ladder::test_every_rung_unpacks.*triton",
    "^test_explain_inside::test_a_terminal",
    "^test_families::test_the_peer",
)


def compiled(patterns):
    return re.compile("|".join(f"(?:{p})" for p in patterns))


SLOW_NAMES, NOT_QUICK_NAMES = compiled(SLOW), compiled(NOT_QUICK)
SLOW_ON_A_CPU_NAMES = compiled(SLOW_ON_A_CPU)


def tier(name: str, gpu: bool = False) -> str:
    """quick, default or slow. name: as in the patterns; gpu: whether the tests run on one."""
    if SLOW_NAMES.search(name) or not gpu and SLOW_ON_A_CPU_NAMES.search(name):
        return "slow"
    return "default" if NOT_QUICK_NAMES.search(name) else "quick"
