//! Where a broker's data lies: an ext4 of its own on a loop device, whose power can be cut, or a small
//! tmpfs. Both are unmounted when dropped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::ioctl::{Setter, ioctl, opcode};
use tempfile::TempDir;

/// `EXT4_IOC_SHUTDOWN`.
const SHUTDOWN: u32 = opcode::read::<u32>(b'X', 125);
/// `EXT4_GOING_FLAGS_NOLOGFLUSH`: neither data nor journal is written any more.
const NO_LOG_FLUSH: u32 = 2;

/// Longest that a child of another test, between its fork and its exec, may have the folder open.
const BUSY_MAX: Duration = Duration::from_secs(5);

/// Memory that outlives a cut, as a disk's platters do, where there is some: it syncs faster.
fn folder() -> TempDir {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() {
        tempfile::tempdir_in(shared)
    } else {
        tempfile::tempdir()
    }
    .expect("a folder")
}

/// A file system in a file.
pub struct LoopDisk {
    folder: TempDir,
    is_mounted: bool,
}

impl LoopDisk {
    pub fn new(mebibytes: u64) -> Self {
        needs_root();
        let folder = folder();
        let image = File::create(folder.path().join("image")).expect("an image");
        image.set_len(mebibytes << 20).expect("a sparse image");
        std::fs::create_dir(folder.path().join("mounted")).expect("a mount point");
        let mut disk = Self {
            folder,
            is_mounted: false,
        };
        run(Command::new("mkfs.ext4").arg("-q").arg(disk.image()));
        disk.mount();
        disk
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    /// Cuts the power: what was not on its way to the device is gone, and every call fails from now on.
    pub fn cut(&self) {
        let root = File::open(self.path()).expect("the mounted folder");
        power_off(&root);
    }

    /// Cuts the power unless that has been done, and mounts again what is left.
    pub fn cut_and_remount(&mut self) {
        // The folder of a disk without power cannot be opened any more.
        if let Ok(root) = File::open(self.path()) {
            power_off(&root);
        }
        self.remount();
    }

    /// Mounts again what a cut has left.
    pub fn remount(&mut self) {
        self.unmount();
        self.mount();
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn mount(&mut self) {
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(self.image())
            .arg(self.path()));
        self.is_mounted = true;
    }

    fn unmount(&mut self) {
        let mut unmount = Command::new("umount");
        unmount.arg(self.path());
        let deadline = Instant::now() + BUSY_MAX;
        while is_busy(&mut unmount) {
            assert!(Instant::now() < deadline, "something stays in the folder");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.is_mounted = false;
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if self.is_mounted {
            // Lazily: a process of a failed test may still be in it.
            let _ = Command::new("umount").arg("-l").arg(self.path()).status();
        }
    }
}

/// A file system in memory that is soon full.
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    pub fn new(mebibytes: u64) -> Self {
        needs_root();
        let folder = tempfile::tempdir().expect("a folder");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"])
            .arg(folder.path()));
        Self { folder }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// Takes all its space but so many bytes.
    pub fn fill(&self, left: u64) {
        let mut filler = OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.filler())
            .expect("the filler");
        let chunk = [1; 4096];
        while self.free_bytes() > left && filler.write_all(&chunk).is_ok() {}
    }

    /// Gives back what was taken.
    pub fn free(&self) {
        std::fs::remove_file(self.filler()).expect("the filler");
    }

    /// Nothing can be written any more, or again.
    pub fn mount_again(&self, how: &str) {
        run(Command::new("mount")
            .args(["-o", &format!("remount,{how}")])
            .arg(self.folder.path()));
    }

    pub fn free_bytes(&self) -> u64 {
        let found = rustix::fs::statvfs(self.folder.path()).expect("the file system");
        found.f_bavail * found.f_frsize
    }

    fn filler(&self) -> PathBuf {
        self.folder.path().join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.folder.path())
            .status();
    }
}

#[expect(unsafe_code, reason = "an ioctl has no safe form")]
fn power_off(root: &File) {
    // SAFETY: `EXT4_IOC_SHUTDOWN` reads one u32, and that is what the setter holds.
    let done = unsafe { ioctl(root, Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH)) };
    done.expect("ext4 takes the shutdown");
}

pub fn needs_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests mount, cut and trace: they need root"
    );
}

fn run(command: &mut Command) {
    let output = output(command);
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// Whether this could not be done because something is still in use; done otherwise.
fn is_busy(command: &mut Command) -> bool {
    let output = output(command);
    let is_busy = String::from_utf8_lossy(&output.stderr).contains("target is busy");
    assert!(
        output.status.success() || is_busy,
        "{command:?}: {output:?}"
    );
    is_busy
}

fn output(command: &mut Command) -> Output {
    let output = command.output();
    output.unwrap_or_else(|e| panic!("{command:?}: {e}"))
}
