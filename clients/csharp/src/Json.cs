using System.Runtime.Serialization.Json;
using System.Text;
using System.Xml;
using System.Xml.Linq;

namespace Safelight
{
    /// <summary>Reads the library's JSON messages, without reflection, so that Unity's IL2CPP compiles it.</summary>
    internal static class Json
    {
        internal static XElement Parse(string json)
        {
            byte[] text = Encoding.UTF8.GetBytes(json);
            using (var reader = JsonReaderWriterFactory.CreateJsonReader(text, XmlDictionaryReaderQuotas.Max))
            {
                return XElement.Load(reader);
            }
        }

        internal static string Text(XElement message, string field) => (string)message.Element(field) ?? "";

        /// <summary>A number, which protobuf writes as text if it has 64 bits. 0 if the field is missing.</summary>
        internal static long Number(XElement message, string field) => (long?)message.Element(field) ?? 0;
    }
}
