//! A web server on loopback that gives images, as slowly as a test needs it.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Serves one file under every path, in pieces, and records where each reply began; returns the
/// address.
pub(crate) fn serve(body: Vec<u8>, piece: usize, pause: Duration) -> (String, mpsc::Receiver<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (began, starts) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (body, began) = (body.clone(), began.clone());
            // A client that is killed is what a test here is about.
            thread::spawn(move || drop(give(stream.unwrap(), &body, piece, pause, &began)));
        }
    });
    (address, starts)
}

fn give(
    mut stream: TcpStream,
    body: &[u8],
    piece: usize,
    pause: Duration,
    began: &mpsc::Sender<usize>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let range =
        head.lines().find_map(|line| line.strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok());
    let from: usize = range.unwrap_or(0);
    // Not every test listens.
    let _ = began.send(from);
    let status = match range {
        Some(from) => format!("206 Partial\r\nContent-Range: bytes {from}-{}/{}", body.len() - 1, body.len()),
        None => "200 OK".to_owned(),
    };
    let length = body.len() - from;
    write!(
        stream,
        "HTTP/1.1 {status}\r\nETag: \"1\"\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    for piece in body[from..].chunks(piece) {
        stream.write_all(piece)?;
        // The server is to be as slow as this.
        thread::sleep(pause);
    }
    Ok(())
}

/// Returns a disk in which nothing is zero.
pub(crate) fn disk() -> Vec<u8> {
    (0..1_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect()
}

/// Waits until so many bytes of the only download in this home are there.
pub(crate) fn wait_for_download(home: &Path, bytes: u64) {
    let downloads = home.join("images/downloads");
    let grown = || {
        let entry = fs::read_dir(&downloads).ok().and_then(|mut entries| entries.next());
        entry
            .and_then(|entry| entry.unwrap().path().join("download").metadata().ok())
            .map_or(0, |file| file.len())
    };
    while grown() < bytes {
        // A file that grows is no event.
        thread::sleep(Duration::from_millis(5));
    }
}
