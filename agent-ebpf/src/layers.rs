//! Layers of images: the folders below the file systems of containers. What is written to there passes for the image's own, since no
//! overlay notices it; so it is compared with when the layer was seen first.

use aya_ebpf::bindings::BPF_NOEXIST;
use palisade_abi::{PATH_DEPTH, codes::error, offsets::ABSENT, state::LayerKey};

use crate::{
    count,
    kernel::KernelPtr,
    maps::{LAYERS, offset, planted},
    overlay::{OVERLAYFS, palisade_changed},
    repeat::{AGAIN, DONE, repeat},
};

/// Most layers of an image that are noted.
const MOST_LAYERS: u32 = 128;

/// Notes the layers of the overlay at `superblock`, those that are not known yet as of `now`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_learn_layers(superblock: u64, now: u64) -> u64 {
    let (size, mount) = (offset!(ovl_layer_size), offset!(ovl_layer_mount));
    let superblock = KernelPtr(superblock);
    if now == 0
        || size == ABSENT
        || mount == ABSENT
        || superblock.read::<u64>(offset!(superblock_magic)) != Some(OVERLAYFS)
    {
        return 0;
    }
    let Some(overlay) = superblock.follow(offset!(superblock_private)) else { return 0 };
    let Some(layers) = overlay.follow(offset!(ovl_fs_layers)) else { return 0 };
    let count: u32 = overlay.read(offset!(ovl_fs_layer_count)).unwrap_or(0);
    let mut about = Layers { first: layers.0, size: u64::from(size), count: u64::from(count), now };
    repeat(MOST_LAYERS, &mut about, learn_layer);
    1
}

/// The layers of an overlay.
struct Layers {
    first: u64,
    /// Of one, in bytes.
    size: u64,
    count: u64,
    now: u64,
}

/// One of them.
///
/// # Safety
///
/// `layers` must be valid.
#[inline(always)]
unsafe extern "C" fn learn_layer(turn: u64, layers: *mut Layers) -> i64 {
    // SAFETY: the caller's promise.
    let Layers { first, size, count, now } = unsafe { layers.read() };
    // The first is the container's own.
    let index = turn + 1;
    if index >= count {
        return DONE;
    }
    if let Some(key) = layer_at(KernelPtr(first + index * size)) {
        let _known_already = LAYERS.insert(key, now, u64::from(BPF_NOEXIST));
        let any = LayerKey { device: key.device, generation: 0, inode: 0 };
        let _as_above = LAYERS.insert(any, now, u64::from(BPF_NOEXIST));
    }
    AGAIN
}

/// Whether the file of the image at `dentry`, which has no upper dentry, was changed in its layer since that was seen first.
/// Whoever reaches the layers by another way (the host's disk, a handle) can do that.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_changed_below(dentry: u64) -> u64 {
    let dentry = KernelPtr(dentry);
    let (lowers, lowers_before_6_5) = (offset!(ovl_entry_lowers), offset!(ovl_entry_lowers_before_6_5));
    // Since 6.5 the inode has the entry, before that the dentry.
    let path = if lowers == ABSENT {
        if lowers_before_6_5 == ABSENT {
            return 0;
        }
        dentry.follow(offset!(dentry_private)).map(|entry| KernelPtr(entry.0 + u64::from(lowers_before_6_5)))
    } else {
        dentry
            .follow(offset!(dentry_inode))
            .and_then(|inode| {
                KernelPtr(inode.0 - u64::from(offset!(ovl_inode_vfs))).follow(offset!(ovl_inode_entry))
            })
            .map(|entry| KernelPtr(entry.0 + u64::from(lowers)))
    };
    let Some(path) = path else { return 0 };
    let Some(lower) = path.follow(offset!(ovl_path_dentry)) else { return 0 };
    let Some(key) = path.follow(offset!(ovl_path_layer)).and_then(layer_at) else { return 0 };
    // SAFETY: one word, written once.
    let Some(seen) = (unsafe { LAYERS.get(key) }) else {
        // It has made room for others, or an image has more than are noted.
        count::error(error::LAYER_UNKNOWN);
        return 0;
    };
    u64::from(palisade_changed(lower.0) > *seen && !planted!(LAYER_CHANGE_UNSEEN))
}

/// The layer that the `struct ovl_layer` at `layer` describes.
#[inline(always)]
fn layer_at(layer: KernelPtr) -> Option<LayerKey> {
    let root = layer.follow(offset!(ovl_layer_mount))?.follow(offset!(vfsmount_root))?;
    let inode = root.follow(offset!(dentry_inode))?;
    let superblock = root.follow(offset!(dentry_superblock))?;
    layer_key(superblock, inode)
}

/// How the folder with `inode` would be known if it were a layer's.
#[inline(always)]
fn layer_key(superblock: KernelPtr, inode: KernelPtr) -> Option<LayerKey> {
    Some(LayerKey {
        device: superblock.read(offset!(superblock_device))?,
        generation: inode.read(offset!(inode_generation))?,
        inode: inode.read(offset!(inode_number))?,
    })
}

/// Whether the file at `dentry` is in a layer of an image that containers have.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn palisade_is_in_layer(dentry: u64) -> u64 {
    let Some(superblock) = KernelPtr(dentry).follow(offset!(dentry_superblock)) else { return 0 };
    let mut search = Search { current: KernelPtr(dentry), superblock, found: 0 };
    repeat(PATH_DEPTH as u32, &mut search, look_for_layer);
    search.found
}

/// A climb that looks for the root of a layer. Nothing is known of where it is, from the first turn on.
struct Search {
    current: KernelPtr,
    superblock: KernelPtr,
    found: u64,
}

/// One step of it.
///
/// # Safety
///
/// `search` must be valid.
#[inline(always)]
unsafe extern "C" fn look_for_layer(_turn: u64, search: *mut Search) -> i64 {
    // SAFETY: the caller's promise.
    unsafe {
        let (current, superblock) = ((*search).current, (*search).superblock);
        if let Some(key) =
            current.follow(offset!(dentry_inode)).and_then(|inode| layer_key(superblock, inode))
            && LAYERS.get(key).is_some()
        {
            (*search).found = 1;
            return DONE;
        }
        match current.follow(offset!(dentry_parent)) {
            Some(parent) if parent != current => (*search).current = parent,
            _ => return DONE,
        }
    }
    AGAIN
}
