//! A pull of a packed image from a web server on loopback, beside the same done by hand with curl,
//! sha256sum and zstd.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Result;
use crate::figures::{Figure, Pair, Target};
use crate::program::Program;

/// How large the disk is: long enough that starting programs is lost in it.
const DISK_MIB: usize = 512;
/// By hand: as it comes it is hashed and unpacked, and written through to the disk at the end.
const BY_HAND: &str = "mkfifo piped && { sha256sum < piped > sum & } && \
    curl -sf \"$0\" | tee piped | zstd -q -d -f -o disk && wait && sync disk";

struct Pull<'a> {
    program: &'a mut Program,
    dir: PathBuf,
    url: String,
    digest: String,
}

impl Pair for Pull<'_> {
    /// Into a home of its own, from exec to exit.
    fn ours(&mut self) -> Result<Duration> {
        let home = self.dir.join("home");
        let url = format!("{}#sha256={}", self.url, self.digest);
        let took = self.program.run("image pull", &home, &["image", "pull", &url])?;
        fs::remove_dir_all(&home)?;
        Ok(took)
    }

    fn bare(&mut self) -> Result<Duration> {
        let by_hand = self.dir.join("by-hand");
        fs::create_dir(&by_hand)?;
        let mut command = Command::new("sh");
        command.args(["-c", BY_HAND, &self.url]).current_dir(&by_hand).stdin(Stdio::null());
        let begin = Instant::now();
        let status = command.status()?;
        let took = begin.elapsed();
        let sum = fs::read_to_string(by_hand.join("sum"))?;
        if !status.success() || !sum.starts_with(&self.digest) {
            return Err(format!("by hand it ended with {status}, and hashed to {sum}").into());
        }
        fs::remove_dir_all(&by_hand)?;
        Ok(took)
    }
}

/// Measures a pull.
pub(crate) fn pull(program: &mut Program, dir: &Path, runs: u32) -> Result<Figure> {
    let dir = dir.join("pull");
    fs::create_dir(&dir)?;
    let packed = pack(&dir)?;
    let sum = Command::new("sha256sum").arg(&packed).output()?;
    let digest = String::from_utf8(sum.stdout)?.split_whitespace().next().unwrap_or_default().to_owned();
    let url = serve(packed)?;
    Figure::measure("pull", Target::Times(1.1), runs, &mut Pull { program, dir, url, digest })
}

/// Writes a disk, a third of it noise, a third text and a third zeros, and packs it.
fn pack(dir: &Path) -> Result<PathBuf> {
    let disk = dir.join("disk.raw");
    let mut file = BufWriter::new(File::create(&disk)?);
    let mut state = 1_u32;
    let mut block = vec![0; 1 << 20];
    for mib in 0..DISK_MIB {
        for byte in &mut block {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noise = (state >> 24) as u8;
            *byte = match mib % 3 {
                0 => noise,
                1 => b'a' + noise % 16,
                _ => 0,
            };
        }
        file.write_all(&block)?;
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    let status = Command::new("zstd").args(["-q", "-3", "--rm"]).arg(&disk).status()?;
    if !status.success() {
        return Err(format!("zstd ended with {status}").into());
    }
    Ok(dir.join("disk.raw.zst"))
}

/// Serves a file under every path until this process ends, and returns its address.
///
/// It is read again each time, since the peak of this process would count as that of those it
/// starts.
fn serve(file: PathBuf) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/disk.raw.zst", listener.local_addr()?);
    std::thread::Builder::new().name("server".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that fails says so itself.
            let _ = give(stream, &file);
        }
    })?;
    Ok(url)
}

fn give(mut stream: TcpStream, file: &Path) -> Result<()> {
    let mut asked = BufReader::new(stream.try_clone()?);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        asked.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
    std::io::copy(&mut file, &mut stream)?;
    Ok(())
}
