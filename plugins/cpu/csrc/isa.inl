// All kernels for one instruction set. The including file sets NS, LANES, MAX_TILE and TABLE.
#include "kernels.h"
#include "simd.h"
// the order matters: each uses what is above it
#include "linear.inl"
#include "kv.inl"
#include "attention_tiles.inl"
#include "attention.inl"
#include "rows.inl"

namespace tokenry {
const Kernels TABLE = {
    NS_NAME,    MAX_TILE,     NS::kDots, NS::pack_rows, NS::linear, NS::write_kv,
    NS::attend, NS::attend_piece, NS::join_pieces, NS::rms_norm, NS::rope, NS::act_mul,
    NS::widen,  NS::argmax,       NS::boltzmann,
};
}  // namespace tokenry
