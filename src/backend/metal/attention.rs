//! Attention on Apple GPUs. Shapes, dtypes and sequences were checked by `custom_ops::attention`.

use candle_core::{DType, Tensor};

use super::encode::{Operand, allocate, run};
use super::plan::Slot;
use super::plan::attention::Call;
use crate::Result;
use crate::backend::custom_ops::attention::AttentionArgs;

const OP: &str = "attention";

fn call<'a>(q: &Tensor, k: &Tensor, args: AttentionArgs<'a>) -> Call<'a> {
    let (q_dims, k_dims) = (q.dims(), k.dims());
    Call {
        queries: q_dims[0],
        keys: k_dims[0],
        query_heads: q_dims[1],
        key_heads: k_dims[1],
        size: q_dims[2],
        dtype: q.dtype(),
        args,
    }
}

/// `(o, lse)`.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, args: AttentionArgs) -> Result<(Tensor, Tensor)> {
    let call = call(q, k, args);
    let (shape, rows) = (q.shape(), (call.queries, call.query_heads));
    let [q, k, v] = [Operand::whole(OP, "q", q)?, Operand::whole(OP, "k", k)?, Operand::whole(OP, "v", v)?];
    let device = q.device().clone();
    let o = allocate(OP, &device, shape.elem_count(), call.dtype)?;
    let lse = allocate(OP, &device, rows.0 * rows.1, DType::F32)?;
    let tensors = [(Slot::Q, q), (Slot::K, k), (Slot::V, v), (Slot::O, o.clone()), (Slot::Lse, lse.clone())];
    run(OP, &device, call.forward()?, tensors)?;
    Ok((o.tensor(shape), lse.tensor(rows)))
}

/// `(dq, dk, dv)`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    g: &Tensor,
    args: AttentionArgs,
) -> Result<(Tensor, Tensor, Tensor)> {
    let call = call(q, k, args);
    let device = Operand::whole(OP, "q", q)?.device().clone();
    let like = |tensor: &Tensor| allocate(OP, &device, tensor.elem_count(), call.dtype);
    let (dq, dk, dv) = (like(q)?, like(k)?, like(v)?);
    let tensors = [
        (Slot::Q, Operand::whole(OP, "q", q)?),
        (Slot::K, Operand::whole(OP, "k", k)?),
        (Slot::V, Operand::whole(OP, "v", v)?),
        (Slot::O, Operand::whole(OP, "o", o)?),
        (Slot::Lse, Operand::whole(OP, "lse", lse)?),
        (Slot::G, Operand::whole(OP, "g", g)?),
        (Slot::Dq, dq.clone()),
        (Slot::Dk, dk.clone()),
        (Slot::Dv, dv.clone()),
    ];
    run(OP, &device, call.backward()?, tensors)?;
    Ok((dq.tensor(q.shape()), dk.tensor(k.shape()), dv.tensor(v.shape())))
}
