//! Takes user-data that the user wrote into a file.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use crate::input_file::InputStream;
use crate::spec::{CloudInitConfig, UserData, check_user_data};

/// Reads raw user-data from a file, at most [`CloudInitConfig::MAX_BYTES`] of it, and checks it as
/// [`CloudInitConfig::check`] does.
///
/// # Errors
/// `InvalidInput` on `user_data` where there is no regular file that may be read, or it is longer,
/// is not UTF-8, begins as nothing that cloud-init knows, or is a cloud-config that is not YAML
/// with keys and values: with line and column.
pub fn read_user_data(path: &Path) -> Result<CloudInitConfig> {
    let InputStream { file, bytes, .. } = InputStream::open("user_data", path)?;
    let of_file = |expected: String| Error::invalid("user_data", path.display(), expected);
    let most = CloudInitConfig::MAX_BYTES as u64;
    let mut content = Vec::new();
    // One byte more, since a file can grow after its length was asked, and a pipe has none.
    file.take(most + 1).read_to_end(&mut content).map_err(Error::io("read", path))?;
    if content.len() as u64 > most {
        let found = bytes.unwrap_or_default().max(content.len() as u64);
        return Err(of_file(format!("the file has {found} bytes (expected at most {most})")));
    }
    let content = unpacked(content, &of_file)?;
    let text = String::from_utf8(content).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        of_file(format!("the file is not UTF-8 from its byte {valid} on: write it as plain text"))
    })?;
    // What an editor puts before a text is no part of the document.
    let text = text.trim_start_matches('\u{feff}').to_owned();
    if text.trim().is_empty() {
        return Err(of_file("the file is empty: start it with `#cloud-config`, or omit it".to_owned()));
    }
    check_user_data(&text).map_err(|mistake| of_file(mistake.with_place()))?;
    let config = CloudInitConfig { user_data: UserData::Raw(text), ..CloudInitConfig::default() };
    config.check().map_err(|error| match error {
        Error::Invalid { value, expected, .. } => {
            of_file(format!("the file begins with {value:?}: {expected}"))
        }
        other => other,
    })?;
    Ok(config)
}

/// What gzip's files begin with. Source: RFC 1952, section 2.3.1.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Returns what is in the file once it is unpacked: cloud-init takes packed user-data as well.
///
/// # Errors
/// What is wrong with it.
#[cfg(feature = "images")]
fn unpacked(content: Vec<u8>, of_file: &impl Fn(String) -> Error) -> Result<Vec<u8>> {
    if !content.starts_with(&GZIP) {
        return Ok(content);
    }
    let most = CloudInitConfig::MAX_BYTES;
    let mut plain = Vec::new();
    let unpacking = flate2::read::MultiGzDecoder::new(&content[..]).take(most as u64 + 1);
    let unpacked = { unpacking }.read_to_end(&mut plain);
    unpacked.map_err(|error| of_file("the file can't be decompressed".to_owned()).with_source(error))?;
    match plain.len() > most {
        true => {
            Err(of_file(format!("decompressed, the file has more than {most} bytes, the limit of user-data")))
        }
        false => Ok(plain),
    }
}

/// Returns the content as it is.
///
/// # Errors
/// That it is packed.
#[cfg(not(feature = "images"))]
fn unpacked(content: Vec<u8>, of_file: &impl Fn(String) -> Error) -> Result<Vec<u8>> {
    match content.starts_with(&GZIP) {
        true => Err(of_file("the file is compressed with gzip: decompress it with `gunzip`".to_owned())),
        false => Ok(content),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::fs;

    #[test]
    fn a_file_is_taken_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "#!/bin/sh\ntrue\n").unwrap();
        let config = read_user_data(file.path()).unwrap();
        assert_eq!(config.user_data, UserData::Raw("#!/bin/sh\ntrue\n".into()));
    }

    #[test]
    fn unusable_files_are_refused_by_path_and_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("user,data");
        let refusal = |path: &Path| {
            let error = read_user_data(path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            let text = error.to_string();
            assert!(text.starts_with("user_data: ") && text.contains(path.to_str().unwrap()), "{text}");
            text
        };
        assert!(refusal(&path).contains("no such file"));
        assert!(refusal(dir.path()).contains("a directory"));
        assert!(refusal(Path::new("/dev/zero")).contains("a device"));
        for (content, reason) in [
            (b"#cloud-config\n\xff".to_vec(), "not UTF-8 from its byte 14 on"),
            (b"users: []".to_vec(), "begins with \"users: []\""),
            (Vec::new(), "the file is empty"),
            #[cfg(feature = "images")]
            (vec![0x1f, 0x8b, 8, 0], "the file can't be decompressed"),
            #[cfg(feature = "cloud-init")]
            (b"#cloud-config\n{[\"\n".to_vec(), "user,data\": line 2, column 3: this is not YAML: "),
            (vec![b'#'; (1 << 20) + 5], "has 1048581 bytes (expected at most 1048576)"),
        ] {
            fs::write(&path, content).unwrap();
            let text = refusal(&path);
            assert!(text.contains(reason), "{text}");
        }
    }

    #[test]
    #[cfg(feature = "images")]
    fn a_packed_file_and_one_with_a_byte_order_mark_are_read_as_their_content() {
        use std::io::Write;
        let taken = |content: &[u8]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), content).unwrap();
            read_user_data(file.path()).map(|config| config.user_data)
        };
        let packed = |plain: &[u8]| {
            let mut packing = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packing.write_all(plain).unwrap();
            packing.finish().unwrap()
        };
        let expected = UserData::Raw("#cloud-config\na: 1\n".into());
        assert_eq!(taken("\u{feff}#cloud-config\na: 1\n".as_bytes()).unwrap(), expected);
        assert_eq!(taken(&packed(b"#cloud-config\na: 1\n")).unwrap(), expected);
        let error = taken(&packed(&vec![b'#'; 2 << 20])).unwrap_err().to_string();
        assert!(error.contains("more than 1048576 bytes"), "{error}");
    }

    #[test]
    fn a_file_of_exactly_the_limit_is_taken() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("#!{}", "x".repeat((1 << 20) - 2))).unwrap();
        read_user_data(file.path()).unwrap();
    }
}
