//! Proxies for servers of images, by the scheme of an address, and the servers that are asked
//! directly: [`Proxies`].
//!
//! Pure. The rules are curl's, see "Environment variables" and `NOPROXY` in curl(1).

use std::net::IpAddr;

use reqwest::Url;

use crate::error::{Error, Result};

/// What may stand before `://` in a proxy's address. With `socks4` and `socks5` this host looks
/// names up, with the others the proxy.
const SCHEMES: [&str; 6] = ["http", "https", "socks4", "socks4a", "socks5", "socks5h"];
/// The port of a SOCKS proxy that names none. Source: RFC 1928.
const SOCKS_PORT: u16 = 1080;

/// The proxies that servers are asked through.
#[derive(Clone, Default)]
pub struct Proxies {
    http: Option<ProxyAddress>,
    https: Option<ProxyAddress>,
    except: Vec<NoProxyRule>,
}

/// A proxy, and what names it; displayed without its password.
#[derive(Clone)]
pub(super) struct ProxyAddress {
    pub(super) url: Url,
    field: &'static str,
}

/// Servers that are asked directly.
#[derive(Debug, Clone, PartialEq, Eq)]
enum NoProxyRule {
    All,
    /// A domain with all below it.
    Domain {
        name: String,
        port: Option<u16>,
    },
    /// The addresses that begin with so many bits of this one.
    Network {
        address: IpAddr,
        bits: u8,
        port: Option<u16>,
    },
}

impl std::fmt::Debug for Proxies {
    /// Shows whether there are proxies only: an address may have a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut proxies = f.debug_struct("Proxies");
        proxies.field("has_http", &self.http.is_some()).field("has_https", &self.https.is_some());
        proxies.field("except", &self.except).finish()
    }
}

impl std::fmt::Display for ProxyAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (scheme, host) = (self.url.scheme(), self.url.host_str().unwrap_or_default());
        write!(f, "{scheme}://{host}")?;
        if let Some(port) = self.url.port_or_known_default() {
            write!(f, ":{port}")?;
        }
        write!(f, " ({})", self.field)
    }
}

impl Proxies {
    /// Sets the proxy for `http://` addresses: `http://`, `https://`, `socks4://`, `socks4a://`,
    /// `socks5://` or `socks5h://`, then `[USER:PASSWORD@]HOST[:PORT]`; `http://` may be left out.
    ///
    /// # Errors
    /// `InvalidInput` on `field` for what is no address of a proxy. It may have a password, so it
    /// is not repeated.
    pub fn with_http(self, field: &'static str, url: &str) -> Result<Self> {
        Ok(Self { http: Some(parse(field, url)?), ..self })
    }

    /// Sets the proxy for `https://` addresses.
    ///
    /// # Errors
    /// As for [`with_http`](Self::with_http).
    pub fn with_https(self, field: &'static str, url: &str) -> Result<Self> {
        Ok(Self { https: Some(parse(field, url)?), ..self })
    }

    /// Sets the servers that are asked directly, separated by commas or blanks: a host or a domain
    /// with all below it, with a leading dot or without; an address; addresses in CIDR notation;
    /// each with `:PORT` where only that is meant; or `*`.
    #[must_use]
    pub fn with_exceptions(self, list: &str) -> Self {
        let words = list.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
        Self { except: words.filter_map(exception).collect(), ..self }
    }

    /// Returns whether all servers are asked directly.
    pub(super) fn is_empty(&self) -> bool {
        self.http.is_none() && self.https.is_none()
    }

    /// Returns the proxy for an address.
    pub(super) fn of(&self, url: &Url) -> Option<&ProxyAddress> {
        let proxy = if url.scheme() == "https" { &self.https } else { &self.http };
        let host = url.host_str()?.trim_start_matches('[').trim_end_matches(']');
        let port = url.port_or_known_default();
        proxy.as_ref().filter(|_| !self.except.iter().any(|except| except.matches(host, port)))
    }
}

impl NoProxyRule {
    fn matches(&self, host: &str, of_port: Option<u16>) -> bool {
        let is_port = |port: &Option<u16>| port.is_none() || *port == of_port;
        match self {
            NoProxyRule::All => true,
            NoProxyRule::Domain { name, port } => {
                let host = host.trim_end_matches('.').to_ascii_lowercase();
                let below = host.strip_suffix(name.as_str());
                is_port(port) && below.is_some_and(|below| below.is_empty() || below.ends_with('.'))
            }
            NoProxyRule::Network { address, bits, port } => {
                let host: Option<IpAddr> = host.parse().ok();
                is_port(port) && host.is_some_and(|host| begins_alike(host, *address, *bits))
            }
        }
    }
}

/// Returns whether two addresses of one family agree in so many bits.
fn begins_alike(one: IpAddr, other: IpAddr, bits: u8) -> bool {
    match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            let differ = one.to_bits() ^ other.to_bits();
            differ.leading_zeros() >= u32::from(bits)
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => {
            let differ = one.to_bits() ^ other.to_bits();
            differ.leading_zeros() >= u32::from(bits)
        }
        _ => false,
    }
}

/// Parses one exception; what can match nothing is left out.
fn exception(word: &str) -> Option<NoProxyRule> {
    if word == "*" {
        return Some(NoProxyRule::All);
    }
    if let Some((address, bits)) = word.split_once('/') {
        let (address, bits) = (ip(address)?, bits.parse().ok()?);
        let most = if address.is_ipv4() { 32 } else { 128 };
        return (bits <= most).then_some(NoProxyRule::Network { address, bits, port: None });
    }
    let whole = |address: IpAddr, port| {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        Some(NoProxyRule::Network { address, bits, port })
    };
    if let Some(address) = ip(word) {
        return whole(address, None);
    }
    let (host, port) = match word.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok()?)),
        None => (word, None),
    };
    if let Some(address) = ip(host) {
        return whole(address, port);
    }
    let name = host.strip_prefix('*').unwrap_or(host);
    let name = name.trim_start_matches('.').trim_end_matches('.').to_ascii_lowercase();
    (!name.is_empty()).then_some(NoProxyRule::Domain { name, port })
}

fn ip(text: &str) -> Option<IpAddr> {
    text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text).parse().ok()
}

fn parse(field: &'static str, text: &str) -> Result<ProxyAddress> {
    let expected =
        format!("the address of a proxy: [SCHEME://]HOST[:PORT], SCHEME one of {}", SCHEMES.join(", "));
    let refused = || Error::invalid(field, "…", format!("it can't be read (expected {expected})"));
    let text = text.trim();
    let url = match text.split_once("://") {
        // As desktops write it, and curl reads it.
        Some(("socks", rest)) => format!("socks4://{rest}").parse(),
        Some(_) => text.parse(),
        None => format!("http://{text}").parse(),
    };
    let mut url: Url = url.map_err(|_| refused())?;
    if !SCHEMES.contains(&url.scheme()) {
        let why = format!("vmkit does not support proxies of this scheme (expected {expected})");
        return Err(Error::invalid(field, format!("{}://…", url.scheme()), why));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(refused());
    }
    if url.scheme().starts_with("socks") && url.port().is_none() {
        url.set_port(Some(SOCKS_PORT)).map_err(|()| refused())?;
    }
    Ok(ProxyAddress { url, field })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is_direct(except: &str, url: &str) -> bool {
        let proxies = Proxies::default().with_http("http_proxy", "http://p:1").unwrap();
        let proxies = proxies.with_https("https_proxy", "p:2").unwrap().with_exceptions(except);
        proxies.of(&url.parse().unwrap()).is_none()
    }

    #[test]
    fn each_scheme_has_its_proxy() {
        let of = |proxies: &Proxies, url: &str| {
            proxies.of(&url.parse().unwrap()).map(|proxy| proxy.url.to_string())
        };
        let http = Proxies::default().with_http("http_proxy", "http://p:1").unwrap();
        assert_eq!(of(&http, "http://a/b").as_deref(), Some("http://p:1/"));
        assert_eq!(of(&http, "https://a/b"), None);
        let https = Proxies::default().with_https("https_proxy", "me:pw@p:2").unwrap();
        assert_eq!(of(&https, "https://a/b").as_deref(), Some("http://me:pw@p:2/"));
        assert_eq!(of(&https, "http://a/b"), None);
        let socks = Proxies::default().with_https("all_proxy", "socks5h://p").unwrap();
        assert_eq!(of(&socks, "https://a").as_deref(), Some("socks5h://p:1080"));
        assert!(!format!("{https:?}").contains("pw"));
        let shown = https.of(&"https://a".parse().unwrap()).unwrap().to_string();
        assert_eq!(shown, "http://p:2 (https_proxy)");
    }

    #[test]
    fn exceptions_are_read_as_curl_reads_them() {
        for (except, url) in [
            ("*", "http://a"),
            ("example.org", "http://example.org"),
            ("example.org", "https://www.EXAMPLE.org./x"),
            (".example.org", "http://example.org"),
            (".example.org", "http://a.b.example.org"),
            ("*.example.org", "http://a.example.org"),
            ("a.org b.org,\tc.org", "http://b.org"),
            ("a.org b.org,\tc.org", "http://c.org:81"),
            ("127.0.0.0/8", "http://127.3.2.1:8080"),
            ("10.0.0.1", "http://10.0.0.1"),
            ("[::1]", "http://[::1]:8080"),
            ("::1", "http://[::1]"),
            ("fd00::/8", "https://[fd12::1]"),
            ("example.org:8443", "https://example.org:8443"),
            ("example.org:443", "https://example.org"),
            ("[::1]:81", "http://[::1]:81"),
            ("0.0.0.0/0", "http://9.9.9.9"),
        ] {
            assert!(is_direct(except, url), "{except:?} has {url}");
        }
        for (except, url) in [
            ("", "http://a"),
            (" , ", "http://a"),
            ("example.org", "http://notexample.org"),
            ("example.org", "http://example.org.evil"),
            ("127.0.0.0/8", "http://128.0.0.1"),
            ("127.0.0.0/8", "http://localhost"),
            ("127.0.0.0/99", "http://127.0.0.1"),
            ("10.0.0.1", "http://10.0.0.10"),
            ("example.org:8443", "https://example.org"),
            ("[::1]:81", "http://[::1]"),
            ("0.0.0.0/0", "http://[::1]"),
        ] {
            assert!(!is_direct(except, url), "{except:?} has not {url}");
        }
    }

    #[test]
    fn a_proxy_that_is_none_is_refused_by_its_variable_without_its_password() {
        for (text, said) in [
            ("ftp://me:pw@p", "https_proxy: \"ftp://…\": vmkit does not support proxies of this scheme"),
            ("http://", "https_proxy: \"…\": it can't be read"),
            ("http://me:pw@p:99999", "https_proxy: \"…\": it can't be read"),
            ("a b", "https_proxy: \"…\": it can't be read"),
        ] {
            let error = Proxies::default().with_https("https_proxy", text).unwrap_err().to_string();
            assert!(error.starts_with(said) && error.contains("socks5h") && !error.contains("pw"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(proxy in ".{0,60}", except in ".{0,60}") {
            if let Ok(proxies) = Proxies::default().with_http("http_proxy", &proxy) {
                let proxies = proxies.with_exceptions(&except);
                let _ = proxies.of(&"http://a.example.org:81".parse().unwrap());
            }
        }
    }
}
