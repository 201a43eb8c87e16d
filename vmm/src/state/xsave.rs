//! Extended processor state: x87, SSE, AVX and whatever came after (KVM_GET_XSAVE2).

use kvm_bindings::Xsave;
use kvm_ioctls::VcpuFd;

use super::StateError;
use crate::kvm::failed;

/// `struct kvm_xsave` as it was before it could grow.
pub(super) const BYTES_MIN: usize = 4096;

const WORDS_MIN: usize = BYTES_MIN / 4;

/// A place for as much as this host has.
fn place(bytes: usize) -> Result<Xsave, StateError> {
    let more = bytes.saturating_sub(BYTES_MIN).div_ceil(4);
    Xsave::new(more).map_err(|_| StateError::TooMany {
        what: "words of extended state",
        found: more,
    })
}

/// The words of an area, without the zeros at its end: most of it is zeros, which nobody needs in an image.
fn words_of(area: &Xsave) -> Vec<u32> {
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(area.as_slice());
    let used = words
        .iter()
        .rposition(|word| *word != 0)
        .map_or(0, |last| last + 1);
    words.truncate(used);
    words
}

/// An area of `bytes` that holds `words`; what they leave out is zeros.
fn area_of(words: &[u32], bytes: usize) -> Result<Xsave, StateError> {
    let mut xsave = place(bytes)?;
    let host = WORDS_MIN + xsave.as_slice().len();
    if words.len() > host {
        return Err(StateError::Xsave {
            found: words.len() * 4,
            host: host * 4,
        });
    }
    let (region, more) = words.split_at(words.len().min(WORDS_MIN));
    xsave.as_mut_slice()[..more.len()].copy_from_slice(more);
    // SAFETY: the length of the array that follows is not touched.
    let legacy = unsafe { xsave.as_mut_fam_struct() };
    legacy.xsave.region[..region.len()].copy_from_slice(region);
    Ok(xsave)
}

/// Reads the state, `bytes` long on this host.
pub(super) fn read(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u32>, StateError> {
    let mut xsave = place(bytes)?;
    // SAFETY: `xsave` was made as long as KVM_CAP_XSAVE2 says that the kernel writes.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(failed("read extended processor state"))?;
    Ok(words_of(&xsave))
}

/// Sets the state; what `words` leaves out is zeros.
pub(super) fn write(vcpu: &VcpuFd, words: &[u32], bytes: usize) -> Result<(), StateError> {
    let xsave = area_of(words, bytes)?;
    // SAFETY: `xsave` is as long as KVM_CAP_XSAVE2 says that the kernel reads.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(failed("set extended processor state"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As long as with AMX, whose tiles are past what `struct kvm_xsave` once was.
    const BYTES: usize = 11_008;

    #[test]
    fn an_area_that_has_grown_is_kept_whole() {
        let words: Vec<u32> = (1..).take(BYTES / 4).collect();
        assert_eq!(words_of(&area_of(&words, BYTES).unwrap()), words);
    }

    #[test]
    fn what_is_left_out_of_an_area_is_the_zeros_at_its_end() {
        for used in [0, 1, WORDS_MIN, WORDS_MIN + 1] {
            let words = vec![7; used];
            let area = area_of(&words, BYTES).unwrap();
            assert_eq!(WORDS_MIN + area.as_slice().len(), BYTES / 4);
            assert_eq!(words_of(&area), words);
        }
    }
}
