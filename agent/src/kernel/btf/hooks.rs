//! The kernel's BTF without what attaching does not need: whole, it takes more memory than all of the agent, at the moment in
//! which the maps need theirs.

/// `struct btf_header` of `include/uapi/linux/btf.h`.
const HEADER: usize = 24;
const MAGIC: u16 = 0xeb9f;
/// `struct btf_type`, without what follows it.
const TYPE: usize = 12;
const KIND_FWD: u32 = 7;
const KIND_FUNC: u32 = 12;

/// The functions of `raw` whose name starts with one of `prefixes`, under the numbers that they have there; every other type is a
/// forward declaration without a name. `None` when `raw` is not BTF, or has a kind of type that this build does not know.
pub fn functions(raw: &[u8], prefixes: &[&[u8]]) -> Option<Vec<u8>> {
    let word = |at: usize| -> Option<u32> { Some(u32::from_le_bytes(raw.get(at..at + 4)?.try_into().ok()?)) };
    if raw.get(..2)? != MAGIC.to_le_bytes() {
        return None;
    }
    let [header, types, types_length, strings, strings_length] =
        [word(4)?, word(8)?, word(12)?, word(16)?, word(20)?].map(|value| value as usize);
    let strings = raw.get(header + strings..header + strings + strings_length)?;
    let end = header + types + types_length;
    let mut at = header + types;
    let mut reduced = Vec::with_capacity(types_length / 2);
    // The first string is the empty one.
    let mut names = vec![0];
    while at < end {
        let (name, info) = (word(at)? as usize, word(at + 4)?);
        let kind = info >> 24 & 0x1f;
        let members = (info & 0xffff) as usize;
        at += TYPE + behind(kind, members)?;
        let name = strings.get(name..)?.split(|byte| *byte == 0).next()?;
        let (name_at, info) = if kind == KIND_FUNC && prefixes.iter().any(|prefix| name.starts_with(prefix)) {
            let name_at = names.len() as u32;
            names.extend(name);
            names.push(0);
            (name_at, info)
        } else {
            (0, KIND_FWD << 24)
        };
        for word in [name_at, info, 0] {
            reduced.extend(word.to_le_bytes());
        }
    }
    let mut whole = Vec::with_capacity(HEADER + reduced.len() + names.len());
    whole.extend(MAGIC.to_le_bytes());
    whole.extend([1, 0]);
    for word in [HEADER, 0, reduced.len(), reduced.len(), names.len()] {
        whole.extend((word as u32).to_le_bytes());
    }
    whole.extend(reduced);
    whole.extend(names);
    Some(whole)
}

/// Bytes that follow a type of a kind with so many members.
fn behind(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        // int, variable, declaration tag
        1 | 14 | 17 => 4,
        // pointer, forward, typedef, volatile, const, restrict, function, float, type tag
        2 | 7..=12 | 16 | 18 => 0,
        // array
        3 => 12,
        // struct, union, data section, enum64
        4 | 5 | 15 | 19 => members * 12,
        // enum, function prototype
        6 | 13 => members * 8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use btf_rs::Btf;

    use super::*;

    /// On the kernel that runs the test: every hook has its number, and nothing else has a name.
    #[test]
    fn hooks_keep_their_numbers() {
        let raw = std::fs::read(super::super::VMLINUX).unwrap();
        let reduced = functions(&raw, &[b"bpf_lsm_", b"dequeue_signal"]).unwrap();
        assert!(reduced.len() < raw.len() / 2, "{} of {} bytes", reduced.len(), raw.len());
        let (whole, reduced) = (Btf::from_bytes(&raw).unwrap(), Btf::from_bytes(&reduced).unwrap());
        for hook in
            ["bpf_lsm_bprm_check_security", "bpf_lsm_task_kill", "bpf_lsm_sb_umount", "dequeue_signal"]
        {
            let ids = whole.resolve_ids_by_name(hook).unwrap();
            assert_eq!(reduced.resolve_ids_by_name(hook).unwrap(), ids, "{hook}");
            assert_eq!(ids.len(), 1);
        }
        assert!(reduced.resolve_ids_by_name("task_struct").unwrap_or_default().is_empty());
    }

    #[test]
    fn what_is_no_btf_is_none() {
        assert_eq!(functions(b"", &[b"bpf_lsm_"]), None);
        assert_eq!(functions(&[0xff; 64], &[b"bpf_lsm_"]), None);
        let raw = std::fs::read(super::super::VMLINUX).unwrap();
        assert_eq!(functions(&raw[..raw.len() / 3], &[b"bpf_lsm_"]), None);
        // A kind that does not exist yet.
        let mut unknown = raw[..HEADER + TYPE].to_vec();
        unknown[HEADER + 7] = 31;
        assert_eq!(functions(&unknown, &[b"bpf_lsm_"]), None);
    }
}
