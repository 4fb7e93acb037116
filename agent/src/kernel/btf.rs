//! Where this kernel keeps its fields: resolved from BTF, sizes checked, nothing guessed.

use std::path::{Path, PathBuf};

use btf_rs::{Btf, BtfType, Struct, Type};
use palisade_abi::offsets::{ABSENT, DENTRY_BYTES, FIELDS, KernelOffsets};
use thiserror::Error;

mod hooks;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
/// Fields that have had several names.
const ALTERNATIVES: &[&[&str]] = &[
    &["inode_changed", "inode_changed_before_6_11", "inode_changed_before_6_6"],
    &["ovl_entry_lowers", "ovl_entry_lowers_before_6_5"],
    // Before 6.5 the dentry has the entry.
    &["ovl_inode_entry", "ovl_entry_lowers_before_6_5"],
];
const OVERLAY: &str = "/sys/kernel/btf/overlay";

/// Why the kernel's layout is not known.
#[derive(Debug, Error)]
pub enum BtfError {
    #[error(
        "{path} cannot be read: {source}; the kernel must be built with CONFIG_DEBUG_INFO_BTF (distribution kernels \
         since 5.8 are), and in a container /sys must be the host's"
    )]
    Missing { path: PathBuf, source: std::io::Error },
    #[error("{path} is not BTF: {message}")]
    Malformed { path: PathBuf, message: String },
    #[error(
        "this kernel's {structure} has no member {member} of {size} bytes ({found}); this build does not support it"
    )]
    Field { structure: &'static str, member: &'static str, size: u32, found: String },
    #[error(
        "this kernel's dentry has its parent, its name or its inode before its counter d_seq, or more than {DENTRY_BYTES} bytes behind it; this build \
         does not support it"
    )]
    Dentry,
}

/// The layout of the running kernel.
#[derive(Clone, Debug)]
pub struct Layout {
    pub offsets: KernelOffsets,
    /// Whether the helper `bpf_task_pt_regs` exists (5.15).
    pub have_task_pt_regs: bool,
    /// Whether the helper `bpf_loop` exists (5.17).
    pub have_loop: bool,
    /// How many arguments `dequeue_signal` has; 0 when there is no such function.
    pub dequeue_arguments: u32,
    /// `sizeof(struct pt_regs)`.
    pub pt_regs_size: u32,
    /// Optional fields that this kernel lacks.
    pub absent: Vec<&'static str>,
    /// How overlayfs's inode was found.
    pub overlay: OverlayLayout,
}

/// Where the layout of overlayfs's inode comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlayLayout {
    /// From BTF.
    Btf,
    /// From the size of the inode it embeds, since the module has no BTF (Debian's 5.10). To be proven before use.
    Inferred,
}

/// The functions that stand for the LSM's hooks, and others that programs attach to.
///
/// # Errors
///
/// When there is no BTF, or one that this build cannot read.
pub(super) fn lsm_hooks() -> Result<aya::Btf, BtfError> {
    let path = Path::new(VMLINUX);
    let malformed = |message: String| BtfError::Malformed { path: path.to_owned(), message };
    let raw = std::fs::read(path).map_err(|source| BtfError::Missing { path: path.to_owned(), source })?;
    let hooks = hooks::functions(&raw, &[b"bpf_lsm_", super::programs::AT_RETURN.as_bytes()])
        .ok_or_else(|| malformed("it has types of a kind that this build does not know".to_owned()))?;
    aya::Btf::parse(&hooks, aya::Endianness::default()).map_err(|error| malformed(error.to_string()))
}

impl Layout {
    /// Resolves every field in the running kernel.
    ///
    /// # Errors
    ///
    /// When there is no BTF, or a required field is missing or has another size.
    pub fn of_running_kernel() -> Result<Self, BtfError> {
        let base = read(Path::new(VMLINUX), None)?;
        let split =
            if Path::new(OVERLAY).exists() { Some(read(Path::new(OVERLAY), Some(&base))?) } else { None };
        Self::resolve(&base, split.as_ref())
    }

    fn resolve(base: &Btf, overlay: Option<&Btf>) -> Result<Self, BtfError> {
        let mut values = Vec::with_capacity(FIELDS.len());
        let mut absent = Vec::new();
        for field in FIELDS {
            let btf = match overlay {
                Some(overlay) if field.structure.starts_with("ovl_") => overlay,
                _ => base,
            };
            let found = find(btf, field.structure, field.member);
            match found {
                Ok((offset, size)) if field.size == 0 || size == field.size => values.push(offset),
                other if field.required => {
                    let found = match other {
                        Ok((_, size)) => format!("it has {size}"),
                        Err(message) => message,
                    };
                    return Err(BtfError::Field {
                        structure: field.structure,
                        member: field.member,
                        size: field.size,
                        found,
                    });
                }
                _ => {
                    values.push(ABSENT);
                    absent.push(field.name);
                }
            }
        }
        // Of names for one thing in different versions one is enough.
        for names in ALTERNATIVES {
            if names.iter().any(|name| !absent.contains(name)) {
                absent.retain(|name| !names.contains(name));
            }
        }
        let mut offsets: KernelOffsets = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&values));
        if !offsets.dentry_is_together() {
            return Err(BtfError::Dentry);
        }
        let mut source = OverlayLayout::Btf;
        if offsets.ovl_inode_upper == ABSENT {
            // In every version that lacks BTF for the module, `__upperdentry` follows the embedded inode.
            offsets.ovl_inode_vfs = 0;
            offsets.ovl_inode_upper = structure(base, "inode").map_or(ABSENT, |inode| inode.size() as u32);
            source = OverlayLayout::Inferred;
        }
        let pt_regs_size = structure(base, "pt_regs").map_or(0, |regs| regs.size() as u32);
        Ok(Self {
            offsets,
            have_task_pt_regs: has_helper(base, "BPF_FUNC_task_pt_regs"),
            have_loop: has_helper(base, "BPF_FUNC_loop"),
            dequeue_arguments: arguments(base, super::programs::AT_RETURN),
            pt_regs_size,
            absent,
            overlay: source,
        })
    }
}

fn read(path: &Path, base: Option<&Btf>) -> Result<Btf, BtfError> {
    let bytes = std::fs::read(path).map_err(|source| BtfError::Missing { path: path.to_owned(), source })?;
    let parsed = match base {
        None => Btf::from_bytes(&bytes),
        Some(base) => Btf::from_split_bytes(&bytes, base),
    };
    parsed.map_err(|error| BtfError::Malformed { path: path.to_owned(), message: error.to_string() })
}

fn structure(btf: &Btf, name: &str) -> Option<Struct> {
    btf.resolve_types_by_name(name).ok()?.into_iter().find_map(|found| match found {
        Type::Struct(structure) => Some(structure),
        _ => None,
    })
}

/// Byte offset and size of `member` (dotted) in `name`.
fn find(btf: &Btf, name: &str, member: &str) -> Result<(u32, u32), String> {
    let structure = structure(btf, name).ok_or_else(|| format!("there is no struct {name}"))?;
    if member.is_empty() {
        let size = structure.size() as u32;
        return Ok((size, size));
    }
    let mut current = structure;
    let mut offset = 0;
    let mut names = member.split('.').peekable();
    while let Some(wanted) = names.next() {
        let (at, kind) = member_of(btf, &current, wanted).ok_or_else(|| format!("it has no {wanted}"))?;
        offset += at;
        if names.peek().is_none() {
            return Ok((offset, size(btf, kind).unwrap_or(0)));
        }
        current = match strip(btf, kind) {
            Some(Type::Struct(inner) | Type::Union(inner)) => inner,
            _ => return Err(format!("{wanted} is not a structure")),
        };
    }
    Err("the member's name is empty".to_owned())
}

/// Byte offset and type of a member, also inside anonymous structures and unions. Bit fields are not found.
fn member_of(btf: &Btf, structure: &Struct, wanted: &str) -> Option<(u32, Type)> {
    for member in &structure.members {
        let bits = member.bit_offset();
        let kind = btf.resolve_type_by_id(member.get_type_id()?).ok()?;
        let name = btf.resolve_name(member).unwrap_or_default();
        if name == wanted {
            let is_bit_field = member.bitfield_size().is_some_and(|bits| bits != 0);
            return (!is_bit_field && bits % 8 == 0).then_some((bits / 8, kind));
        }
        if name.is_empty()
            && let Some(Type::Struct(inner) | Type::Union(inner)) = strip(btf, kind)
            && let Some((at, kind)) = member_of(btf, &inner, wanted)
        {
            return Some((bits / 8 + at, kind));
        }
    }
    None
}

/// Looks through typedefs and qualifiers.
fn strip(btf: &Btf, mut kind: Type) -> Option<Type> {
    for _ in 0..16 {
        let next = match &kind {
            Type::Typedef(inner) => inner.get_type_id()?,
            Type::Volatile(inner) | Type::Const(inner) | Type::Restrict(inner) => inner.get_type_id()?,
            Type::TypeTag(inner) => inner.get_type_id()?,
            _ => return Some(kind),
        };
        kind = btf.resolve_type_by_id(next).ok()?;
    }
    None
}

fn size(btf: &Btf, kind: Type) -> Option<u32> {
    Some(match strip(btf, kind)? {
        Type::Int(int) => int.size() as u32,
        Type::Ptr(_) => 8,
        Type::Struct(inner) | Type::Union(inner) => inner.size() as u32,
        Type::Enum(inner) => inner.size() as u32,
        Type::Enum64(inner) => inner.size() as u32,
        Type::Float(inner) => inner.size() as u32,
        Type::Array(array) => {
            let element = btf.resolve_type_by_id(array.get_type_id()?).ok()?;
            size(btf, element)? * array.len() as u32
        }
        _ => return None,
    })
}

/// How many arguments a function has; 0 when there is none of this name.
fn arguments(btf: &Btf, function: &str) -> u32 {
    let of = |found: &Type| match found {
        Type::Func(function) => match btf.resolve_type_by_id(function.get_type_id()?).ok()? {
            Type::FuncProto(prototype) => Some(prototype.parameters.len() as u32),
            _ => None,
        },
        _ => None,
    };
    btf.resolve_types_by_name(function).ok().and_then(|found| found.iter().find_map(of)).unwrap_or(0)
}

fn has_helper(btf: &Btf, name: &str) -> bool {
    btf.resolve_types_by_name("bpf_func_id").unwrap_or_default().iter().any(|found| match found {
        Type::Enum(helpers) => {
            helpers.members.iter().any(|member| btf.resolve_name(member).is_ok_and(|found| found == name))
        }
        _ => false,
    })
}
