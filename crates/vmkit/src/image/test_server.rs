//! A web server for tests, on loopback: it can cut, stall, redirect, forget ranges, and tells what
//! it was asked.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What lies at a path.
#[derive(Debug, Clone)]
pub(super) struct ServedFile {
    pub(super) status: &'static str,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    /// Whether it supports `Range`, and the file's ETag.
    pub(super) etag: Option<String>,
    /// After how many bytes of the body each reply is interrupted, in order; those that follow are
    /// whole.
    pub(super) cuts: Vec<usize>,
    /// What it does with `Range` otherwise than it should.
    pub(super) oddity: RangeFault,
    /// How long it waits before each 4 KiB.
    pub(super) pause: Duration,
    /// Whether it falls silent instead of closing where it cuts.
    pub(super) stalls: bool,
    /// Whether it says how long the body is.
    pub(super) tells_length: bool,
    /// The required `Authorization`; without it the reply is 401 with this challenge.
    pub(super) guarded: Option<(String, String)>,
}

/// How an answer to `Range` is odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RangeFault {
    None,
    /// Each part has at most so many bytes.
    ShortParts(usize),
    /// As that, without the total length.
    ShortPartsOfSome(usize),
    /// It sends no ETag, though it supports `Range`.
    NoEtag,
    /// It sends a part of what it has now, whatever `If-Range` says.
    NoIfRange,
    /// As that, and with a part it tells no ETag.
    NoIfRangeNorEtag,
}

impl ServedFile {
    pub(super) fn new(body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: "200 OK",
            headers: Vec::new(),
            body: body.into(),
            etag: Some("\"one\"".to_owned()),
            cuts: Vec::new(),
            oddity: RangeFault::None,
            pause: Duration::ZERO,
            stalls: false,
            tells_length: true,
            guarded: None,
        }
    }

    pub(super) fn status(status: &'static str) -> Self {
        Self { status, ..Self::new("no") }
    }
}

/// What was requested.
#[derive(Debug, Clone)]
pub(super) struct ReceivedRequest {
    pub(super) path: String,
    /// What stood behind the `?`.
    pub(super) query: String,
    pub(super) headers: BTreeMap<String, String>,
    /// What came with it, of a form.
    pub(super) body: String,
}

#[derive(Debug, Default)]
struct ServerState {
    pages: BTreeMap<String, ServedFile>,
    asked: Vec<ReceivedRequest>,
}

/// A server that runs until the runtime ends.
#[derive(Debug, Clone)]
pub(super) struct TestServer {
    base: String,
    shared: Arc<Mutex<ServerState>>,
}

impl TestServer {
    pub(super) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Mutex::new(ServerState::default()));
        let state = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&state)));
            }
        });
        Self { base, shared }
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Returns `HOST:PORT`.
    pub(super) fn host(&self) -> &str {
        &self.base["http://".len()..]
    }

    pub(super) fn put(&self, path: &str, page: ServedFile) {
        self.shared.lock().unwrap().pages.insert(path.to_owned(), page);
    }

    /// Returns all that was asked of a path.
    pub(super) fn asked(&self, path: &str) -> Vec<ReceivedRequest> {
        self.shared.lock().unwrap().asked.iter().filter(|asked| asked.path == path).cloned().collect()
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Mutex<ServerState>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let address = lines.next().unwrap().split(' ').nth(1).unwrap();
    let (path, query) = address.split_once('?').unwrap_or((address, ""));
    let header = |line: &str| line.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()));
    let headers: BTreeMap<String, String> = lines.filter_map(header).collect();
    let mut body = vec![0; headers.get("content-length").map_or(0, |length| length.parse().unwrap())];
    if stream.read_exact(&mut body).await.is_err() {
        return;
    }
    let (page, cut) = {
        let mut shared = shared.lock().unwrap();
        let (path, query) = (path.to_owned(), query.to_owned());
        let mut page = shared.pages.get_mut(&path);
        let cut = page.as_mut().and_then(|page| (!page.cuts.is_empty()).then(|| page.cuts.remove(0)));
        let page = page.cloned().unwrap_or_else(|| ServedFile::status("404 Not Found"));
        let body = String::from_utf8(body).unwrap();
        shared.asked.push(ReceivedRequest { path, query, headers: headers.clone(), body });
        (page, cut)
    };
    // A client that goes away is what some tests are about.
    let _ = answer(&mut stream, &page, cut, &headers).await;
}

async fn answer(
    stream: &mut TcpStream,
    page: &ServedFile,
    cut: Option<usize>,
    headers: &BTreeMap<String, String>,
) -> std::io::Result<()> {
    let mut answer = String::new();
    if let Some((token, challenge)) = &page.guarded
        && headers.get("authorization") != Some(token)
    {
        answer = format!("HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: {challenge}\r\n");
        answer.push_str("Content-Length: 0\r\nConnection: close\r\n\r\n");
        return stream.write_all(answer.as_bytes()).await;
    }
    let (head, body) = part(page, headers);
    answer.push_str(&head);
    for (name, value) in &page.headers {
        answer.push_str(&format!("{name}: {value}\r\n"));
    }
    if page.tells_length {
        answer.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    answer.push_str("Connection: close\r\n\r\n");
    stream.write_all(answer.as_bytes()).await?;
    let sent = &body[..cut.unwrap_or(body.len()).min(body.len())];
    if page.pause.is_zero() {
        stream.write_all(sent).await?;
    } else {
        for piece in sent.chunks(4096) {
            tokio::time::sleep(page.pause).await;
            stream.write_all(piece).await?;
        }
    }
    if cut.is_some() && page.stalls {
        std::future::pending::<()>().await;
    }
    stream.flush().await
}

/// Returns how an answer begins, and what of the page it has: all, or the part that was requested.
fn part<'a>(page: &'a ServedFile, headers: &BTreeMap<String, String>) -> (String, &'a [u8]) {
    let range = headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
    let is_careless = matches!(page.oddity, RangeFault::NoIfRange | RangeFault::NoIfRangeNorEtag);
    let is_same = headers.get("if-range").is_none_or(|validator| Some(validator) == page.etag.as_ref());
    // A refusal has no parts.
    let has_parts = page.status == "200 OK" && page.etag.is_some() && (is_same || is_careless);
    let from = range.and_then(|from| from.parse().ok()).filter(|_| has_parts).unwrap_or(0);
    let total = page.body.len();
    let mut head = String::new();
    let mut body = page.body.get(from..).unwrap_or_default();
    if from > 0 && body.is_empty() {
        let head = format!("HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{total}\r\n");
        return (head, body);
    }
    if from > 0 {
        let told = match page.oddity {
            RangeFault::ShortPartsOfSome(_) => "*".to_owned(),
            _ => total.to_string(),
        };
        if let RangeFault::ShortParts(most) | RangeFault::ShortPartsOfSome(most) = page.oddity {
            body = &body[..most.min(body.len())];
        }
        let last = from + body.len() - 1;
        head.push_str(&format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{last}/{told}\r\n"
        ));
    } else {
        head.push_str(&format!("HTTP/1.1 {}\r\n", page.status));
    }
    let tells_etag = match page.oddity {
        RangeFault::NoEtag => false,
        RangeFault::NoIfRangeNorEtag => from == 0,
        _ => true,
    };
    if let Some(etag) = page.etag.as_ref().filter(|_| tells_etag) {
        head.push_str(&format!("ETag: {etag}\r\n"));
    }
    (head, body)
}
