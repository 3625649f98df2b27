"""`lab ops`: the table of ops, and the weight formats."""

from lab.contract import DTYPES


def main(args) -> int:
    from lab.formats import FORMATS
    from lab.ops import OPS

    names = {dtype: name for name, dtype in DTYPES.items()}
    rows = [
        {
            "op": op.name,
            "dtypes": [names[d] for d in op.dtypes],
            "cases": len(op.cases),
            "formula": op.summary,
            "cuda": f"cuda_src/{op.name}.cu",
            "triton": f"triton_kernels/{op.name}.py",
            "contract": f"lab/ops/{op.name}.py",
        }
        for op in OPS
    ]
    if args.json:
        import json

        print(json.dumps(rows, indent=1))
        return 0
    width = max(len(row["op"]) for row in rows)
    for row in rows:
        print(f"{row['op']:{width}}  {','.join(row['dtypes']):14}  {row['formula']}")
    print(
        "\nOp X: its contract is lab/ops/X.py, its kernels are cuda_src/X.cu and triton_kernels/X.py;\n"
        "`lab explain X` shows them side by side.\n\nWeight formats, of --quantise and of files:"
    )
    width = max(map(len, FORMATS))
    for f in FORMATS.values():
        print(f"{f.name:{width}}  {f.bits_a_weight:5g} bits a weight  {f.summary}")
    print(
        "\nFormats X and X-... are in lab/formats/X.py, cuda_src/formats/X.cuh and\n"
        "triton_kernels/formats/X.py; `lab explain X` shows the last two side by side."
    )
    return 0
