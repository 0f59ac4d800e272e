"""wip"""
import torch
from torch import Tensor
from momkit.mechanisms.base import Affine, Structure, Inputs, Mechanism, Sizes, State
from momkit.mechanisms.pair_decay import *
from momkit.mechanisms.reference import Lanes

SMALL_SOLVE=16
def solve_unit_lower(A: Tensor, R: Tensor) -> Tensor:
    """X with (I + strictly lower part of A) X = R: `[B, C, C]`, `[B, C, D]`, by halves."""
    C = A.shape[-1]
    if C <= SMALL_SOLVE:
        eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        return torch.bmm(torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True), R)
    (upper, lower), (R1, R2) = A.split(C // 2, 1), R.split(C // 2, 1)
    A21, A22 = lower.split(C // 2, 2)
    X1 = solve_unit_lower(upper[..., : C // 2], R1)
    X2 = solve_unit_lower(A22, torch.baddbmm(R2, A21, X1, alpha=-1))
    return torch.cat([X1, X2], 1)

GROUP=64
class Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, S, whole, write, U, W, B, counts):
        """S_{t+1} = whole S + write + B^T (U + W S)"""
        starts=U.new_empty(len(U),*S.shape[1:]); V=torch.empty_like(U)
        at=0
        for n in counts:
            r=slice(at,at+n); at+=n
            starts[r]=S
            torch.baddbmm(U[r],W[r],S,out=V[r])
            S=torch.baddbmm(whole[r]*S,B[r].mT,V[r])
        ctx.save_for_backward(starts,V,whole,W,B); ctx.counts=counts
        return starts,V,S
    @staticmethod
    def backward(ctx, gstarts, gV, gS):
        starts,V,whole,W,B=ctx.saved_tensors
        gN=torch.empty_like(starts); gU=torch.empty_like(V)
        at=len(V)
        for n in reversed(ctx.counts):
            r=slice(at-n,at); at-=n
            gN[r]=gS
            torch.baddbmm(gV[r],B[r],gS,out=gU[r])
            gS=torch.baddbmm(gstarts[r].addcmul(whole[r],gS),W[r].mT,gU[r])
        gw=(gN*starts).sum((1,2),keepdim=True)
        return gS,gw,None,gU,torch.bmm(gU,starts.mT),torch.bmm(V,gN.mT),None

def gated(q,k,v,g,beta,S,counts,H,scale):
    B,C,K=k.shape; V=v.shape[-1]
    d=HeadDecay(g)
    bk=k*beta[...,None]
    A=d.pairs(bk,k)
    X=solve_unit_lower(A,torch.cat([v*beta[...,None],-d.seen_from_start(bk)],-1))
    U,W=X.split([V,K],-1)
    starts,vn,S=Carry.apply(S,d.whole(),None,U,W,d.kept_to_end(k),[c*H for c in counts])
    o=torch.baddbmm(torch.bmm(d.pairs(q,k),vn),d.seen_from_start(q),starts)
    return o,S
def affine_scan(q,k,v,g,beta,S0,C):
    T,H,V=v.shape
    n=T//C
    idx=torch.arange(T*H).view(n,C,H).transpose(1,2).reshape(-1)
    def pk(x): return x.reshape(T*H,-1).index_select(0,idx).view(n*H,C,-1)
    q,k,v=map(pk,(q,k,v)); g=pk(g).squeeze(-1); beta=pk(beta).squeeze(-1)
    S=S0.flatten(0,1); os=[]
    step=max(1,GROUP*64//C//H)*H
    for a in zip(*[x.split(step) for x in (q,k,v,g,beta)]):
        o,S=gated(*a,S,[1]*(len(a[0])//H),H,1)
        os.append(o)
    o=torch.cat(os).view(n*H*C,V)*(q.shape[-1]**-.5)
    inv=torch.empty_like(idx); inv[idx]=torch.arange(len(idx))
    return o.index_select(0,inv).view(T,H,V),S.view_as(S0)
